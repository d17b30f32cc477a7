"""Suffixes under which anybody can have a name: a wildcard on one would list strangers.

An own, compact table, not a copy of the Public Suffix List: what a mistaken or careless wildcard is likely to name.
A top-level label is never allowed as a wildcard, so single labels need no table for that. The list cannot be
complete; docs/policy.md says so.
"""

from __future__ import annotations

import re

TOP_LEVEL: frozenset[str] = frozenset(
    "com net org edu gov mil int arpa info biz io uk eu de fr nl ch at jp cn".split()  # noqa: SIM905 - a table
)
"""Single labels that are refused as a name too: nobody's compose service is called so."""

_SECOND_LEVEL = {
    "ac": "at cn id il in jp ke kr nz ru th uk za",
    "co": "at bw id il in jp ke kr nz th tz ug uk ve za zm zw",
    "com": "ar au bd bo br cn co cy do ec eg es gh gr gt hk hn ke kh lb mt mx my ng ni np pa pe ph pk pl pr py qa sa "
    "sg sv tn tr tw ua uy ve vn",
    "edu": "ar au br cn co eg hk in mx my pe ph pk pl sg tr tw ua vn",
    "go": "id jp ke kr th",
    "gob": "ar cl es mx pe",
    "gov": "au br cn hk il in it my ng ph pl sa sg tr tw ua uk vn za",
    "ltd": "uk",
    "me": "uk",
    "ne": "jp kr",
    "net": "ar au br cn hk id il in mx my nz ph pl sg tr tw ua uk vn za",
    "nhs": "uk",
    "or": "at id jp ke kr th",
    "org": "ar au br cn hk il in mx my ng nz ph pl sg tr tw ua uk vn za",
    "plc": "uk",
}

REGISTRY: frozenset[str] = frozenset(
    f"{label}.{country}" for label, countries in _SECOND_LEVEL.items() for country in countries.split()
)
"""Second-level suffixes that country registries sell names under."""

SHARED: frozenset[str] = frozenset(
    """
    github.io gitlab.io bitbucket.io codeberg.page sourceforge.io readthedocs.io gitbook.io
    amazonaws.com amazonaws.com.cn on.aws awsapps.com awsapprunner.com amplifyapp.com elasticbeanstalk.com
    cloudfront.net
    azurewebsites.net azurestaticapps.net azureedge.net azurefd.net azurecontainer.io azurecontainerapps.io
    cloudapp.net cloudapp.azure.com trafficmanager.net windows.net core.windows.net blob.core.windows.net
    web.core.windows.net file.core.windows.net queue.core.windows.net table.core.windows.net dfs.core.windows.net
    database.windows.net servicebus.windows.net vault.azure.net azure-api.net azurecr.io b2clogin.com sharepoint.com
    appspot.com run.app a.run.app web.app firebaseapp.com firebaseio.com cloudfunctions.net
    storage.googleapis.com withgoogle.com blogspot.com googleusercontent.com translate.goog
    pages.dev workers.dev r2.dev cloudflarestorage.com r2.cloudflarestorage.com trycloudflare.com cdn.cloudflare.net
    fastly.net fastlylb.net edgekey.net edgesuite.net akamaized.net akamaihd.net b-cdn.net stackpathcdn.com
    digitaloceanspaces.com ondigitalocean.app linodeobjects.com backblazeb2.com wasabisys.com vultrobjects.com
    herokuapp.com herokudns.com vercel.app now.sh netlify.app onrender.com fly.dev railway.app up.railway.app
    deno.dev surge.sh glitch.me repl.co replit.app replit.dev stackblitz.io webcontainer.io codesandbox.io csb.app
    gitpod.io app.github.dev github.dev githubpreview.dev hf.space streamlit.app pythonanywhere.com
    supabase.co supabase.in myshopify.com wordpress.com wixsite.com weebly.com squarespace.com tumblr.com medium.com
    notion.site webflow.io framer.app bubbleapps.io zendesk.com atlassian.net
    ngrok.io ngrok.app ngrok.dev ngrok-free.app ngrok-free.dev loca.lt localtunnel.me serveo.net localhost.run lhr.life
    bore.digital pagekite.me ts.net devtunnels.ms pipedream.net requestbin.net webhook.site
    oast.fun oast.live oast.me oast.online oast.pro oast.site interact.sh burpcollaborator.net oastify.com dnslog.cn
    duckdns.org no-ip.org no-ip.com noip.me ddns.net dynu.net dyndns.org hopto.org zapto.org sytes.net freeddns.org
    nip.io sslip.io xip.io traefik.me lvh.me
    eu.org uk.com us.com de.com gb.net co.com
    """.split()  # noqa: SIM905 - a table
)
"""Hosts, clouds, tunnels and dynamic DNS where a name below is a stranger's for the asking."""

_AWS_LABEL = re.compile(
    r"[a-z]{2,3}(-[a-z]+)+-[0-9]+"  # a region, as in us-east-1
    r"|s3[a-z0-9-]*|dualstack|elb|compute(-1)?|execute-api|lambda-url|rds|cache|es|sqs|sns|dkr|ecr|elasticbeanstalk"
)


def is_top_level(name: str) -> bool:
    """True for a bare top-level label or a registry's second level: never a host that somebody means."""
    return name in TOP_LEVEL or name in REGISTRY


def is_shared(name: str) -> bool:
    """True when names directly below `name` belong to different people (so `*.name` must not be listed)."""
    if "." not in name or name in REGISTRY or name in SHARED:
        return True
    for cloud in (".amazonaws.com", ".amazonaws.com.cn", ".on.aws"):
        if name.endswith(cloud):
            return all(_AWS_LABEL.fullmatch(label) for label in name.removesuffix(cloud).split("."))
    return False
