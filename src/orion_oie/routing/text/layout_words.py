"""Words of page layout: what stands on a page, where it stands, and where the page is seen.

Each of them is common; a short prompt with words of two or three of these groups is mostly about
the style sheet of a page.
"""

_THINGS_WORDS = """
    header headers footer footers sidebar navbar nav menu submenu menus dropdown button buttons
    banner card cards div span icon icons logo thumbnail carousel slider tooltip popup modal
    accordion heading headings headline caption paragraph paragraphs background border borders
    margin margins padding gutter hero breadcrumb breadcrumbs placeholder checkbox textarea input
    inputs label labels grid flexbox flex column columns image images picture pictures photo box
    boxes layout font fonts link links text tabs tab iframe video form newsletter template
"""
_THINGS = frozenset(_THINGS_WORDS.split())
_PLACING_WORDS = """
    center centre centered centred align aligned alignment vertically horizontally sticky float
    floats overlap overlaps overlapping wrap wraps wrapping overflow overflows hover stretch
    stretched responsive collapse collapses indent indented underline shadow rounded transparent
    opacity fixed absolute z-index width height max-width min-width animate animation fade fades
    side beside stack stacked pixels px rem em ems breakpoint spacing zoom scroll scrolls scrolling
    squished cropped crop wider narrower hide hidden gap uneven
"""
_PLACING = frozenset(_PLACING_WORDS.split())
_SEEN_ON_WORDS = """
    css html page webpage homepage website site sites web browser screen screens mobile phone phones
    desktop tablet safari firefox chrome outlook wordpress bootstrap tailwind shopify squarespace
    wix latex portfolio email stylesheet landing
"""
_SEEN_ON = frozenset(_SEEN_ON_WORDS.split())
_MOST_CHARS = 400
_AROUND = ",.;:!?()\"'`’"
_STRENGTHS = (0.0, 0.0, 0.5, 1.0)  # with words of so many of the groups


def layout(text: str) -> float:
    """How much a short text reads like a question about the layout of a page, in [0, 1]."""
    if len(text) > _MOST_CHARS:
        return 0.0
    words = {word.strip(_AROUND) for word in text.lower().split()}
    groups = sum(not group.isdisjoint(words) for group in (_THINGS, _PLACING, _SEEN_ON))
    return _STRENGTHS[groups]
