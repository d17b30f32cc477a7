"""The only code that touches netfilter."""
