"""The order of the methods and the colour that each keeps, in tables, figures and dashboards."""

ORDER = ("FULL", "USPLIT", "UDEC", "ULATDEC", "LOCAL", "CENTRAL")
COLOURS = {
    "FULL": "#0072B2",
    "USPLIT": "#E69F00",
    "UDEC": "#009E73",
    "ULATDEC": "#CC79A7",
    "LOCAL": "#56B4E9",
    "CENTRAL": "#D55E00",
}
"""Of Okabe and Ito's palette, which colour-blind people can tell apart."""

OTHERS = ("#7F7F7F", "#B8A400", "#8C6D46", "#7A68C8")
"""For methods of a user's own, in the order of their names."""


def rank(method: str) -> tuple[int, str]:
    """Sorts methods: the known ones in their order, then others by name."""
    return (ORDER.index(method) if method in ORDER else len(ORDER)), method


def colours(methods: set[str]) -> dict[str, str]:
    """The colour of each method, in order."""
    others = sorted(methods - COLOURS.keys())
    drawn = COLOURS | {method: OTHERS[i % len(OTHERS)] for i, method in enumerate(others)}
    return {method: drawn[method] for method in sorted(methods, key=rank)}
