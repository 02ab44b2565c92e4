"""Order and colours of the methods, the same in tables, figures and dashboards."""

METHODS = ("FULL", "USPLIT", "UDEC", "UDEC_WARM", "ULATDEC", "ULATDEC_WARM", "LOCAL", "CENTRAL")
COLOURS = {
    "FULL": "#0072B2",
    "USPLIT": "#E69F00",
    "UDEC": "#009E73",
    "ULATDEC": "#CC79A7",
    "LOCAL": "#56B4E9",
    "CENTRAL": "#D55E00",
}
"""From the palette of Okabe and Ito, which colour-blind people can distinguish."""

OTHERS = ("#7F7F7F", "#B8A400", "#8C6D46", "#7A68C8")
"""For user-defined methods, in the order of their names."""


def rank(method: str) -> tuple[int, str]:
    """Sort key: the listed methods in their order, then others by name."""
    return (METHODS.index(method) if method in METHODS else len(METHODS)), method


def colours(methods: set[str]) -> dict[str, str]:
    """The colour of each method, in the order of `rank`."""
    others = sorted(methods - COLOURS.keys())
    drawn = COLOURS | {method: OTHERS[i % len(OTHERS)] for i, method in enumerate(others)}
    return {method: drawn[method] for method in sorted(methods, key=rank)}
