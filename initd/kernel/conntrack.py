def outgoing():
    return ()


def cut(flows):
    return ()


def destinations():
    return ()
