"""Penn Treebank tokens of a caption, as in the official COCO evaluation.

pycocoevalcap runs Stanford's PTBTokenizer 3.4.1 in Java (`-preserveLines -lowerCase`) and removes a
list of punctuation tokens. This is the same in Python. The rules were found by querying that tokenizer, and
`tests/evaluation/test_tokenization.py` compares both. Quirks are kept on purpose, because scores are
comparable only with the same tokens: brackets stay as `-lrb-` (the official list names them in
capitals, after lower-casing), `£` becomes `#`, `!!` stays while `!` goes, emoji are dropped. One quirk is
not reproduced: Java reads all captions as one text, so `vitamin C.` loses its period where the *next* caption
starts with a word such as `The`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""pycocoevalcap's list without the bracket names, which never match lower-cased tokens."""

# Letters with their combining marks; digits apart. Python's \w also takes ², ½ and _, Stanford's letters do not.
_L = r"(?:[^\W\d_²³¹¼½¾⅓⅔⅛⅜⅝⅞]|[\u0300-\u036f\u0900-\u0903\u093a-\u094f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e])"
_W = rf"(?:{_L}|\d)"
_END = rf"(?!{_W})"
_APOSTROPHE = r"['’]"

_ABBREVIATIONS = (
    r"adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|atty|aug|ave|bhd|bldg|blvd|brig|bros|calif|capt|cf|"
    r"cie|cmdr|co|col|colo|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|elec|ens|esq|est|etc|ext|feb|fla|"
    r"fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kan|kans|ky|lieut|lt|ltd|maj|"
    r"mar|md|messrs|mfg|mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|"
    r"penn|pfc|ph|plc|ppte|ppty|pres|prof|pte|ptes|pty|ptys|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|"
    r"sfc|sgt|spc|sq|sr|st|ste|supt|supts|sys|tel|tenn|thu|thurs|treas|tue|tues|univ|va|vs|vt|wed|wis|wisc|"
    r"wm|wyo"
)
_CAPITALISED_ABBREVIATIONS = r"Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBERING = r"art|ca|fig|figs|no|nos|op|pp|prop"
"""These are abbreviations only before a number."""

_SENTENCE_STARTS = (
    r"A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|"
    r"More|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|"
    r"When|While|Yet|You"
)
"""After a single letter and a period, these words start a new sentence: `vitamin C. The man`."""

_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}
_SYMBOLS = {"£": "#", "€": "$", "¢": "cents", "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

Render = Callable[[str], tuple[str, ...]]


def ptb_tokens(caption: str) -> list[str]:
    """Lower-case tokens without punctuation. A token may hold a no-break space, as in `2 1/2`."""
    text = caption.replace("\n", " ")
    tokens: list[str] = []
    position = 0
    while position < len(text):
        end, found = _longest(text, position)
        tokens.extend(token for token in found if token not in PUNCTUATION)
        position = end
    return tokens


def _longest(text: str, start: int) -> tuple[int, tuple[str, ...]]:
    """End and tokens of the longest match, the earlier rule where two are equally long."""
    best: int = start
    render: Render = _drop
    for pattern, candidate in _RULES:
        match = pattern.match(text, start)
        if match is not None and match.end() > best:
            best, render = match.end(), candidate
    if best == start:  # no rule matches the character: it separates tokens and is dropped
        return start + 1, ()
    return best, render(text[start:best])


def _drop(_: str) -> tuple[str, ...]:
    return ()


def _keep(text: str) -> tuple[str, ...]:
    """One token; blanks inside become no-break spaces, apostrophes and brackets take their plain form."""
    token = text.lower().replace("’", "'").replace("‘", "'").replace(" ", "\u00a0").replace("&amp;", "&")
    for bracket, name in _BRACKETS.items():
        token = token.replace(bracket, name)
    return (token,)


def _negation(text: str) -> tuple[str, ...]:
    """`don't` is `do n't`."""
    token = text.lower().replace("’", "'")
    return tuple(part for part in (token[:-3], token[-3:]) if part)


def _word(text: str) -> tuple[str, ...]:
    token = text.lower().replace("’", "'")
    return _SPLIT_WORDS.get(token, (token,))


def _symbol(text: str) -> tuple[str, ...]:
    return (_SYMBOLS.get(text, _FRACTIONS.get(text, text)),)


_WORD = rf"{_W}+"
_NUMBER = r"[-+]?(?:\d+(?:[.,:]\d+)*|(?:[.,:]\d+)+)"
_DOTTED = rf"{_L}{_W}*(?:\.{_L}{_W}*)+"
_HYPHENS = r"(?:-[A-Za-z]+){0,2}"
_LINK_END = r"[^\s\"<>|()]*[^\s\"<>|()\[\]{}.,!?;:'-]"

_BLANKS_AND_QUOTES: tuple[tuple[str, Render], ...] = ((r"\s+|[\"'`“”‘’‛«»‹›「」…‐‑]|[–—―]|''|-{1,4}|\.\.+", _drop),)
_LINKS: tuple[tuple[str, Render], ...] = (
    (r"</?[A-Za-z][^<>\n]*>", _keep),
    (rf"(?i:https?://|www\.){_LINK_END}", _keep),
    (rf"[A-Za-z0-9][A-Za-z0-9.]*\.(?i:com|net|org|edu)(?:/{_LINK_END})?(?![A-Za-z0-9])", _keep),
    (r"[A-Za-z0-9][\w.+-]*@[A-Za-z0-9][\w-]*(?:\.[A-Za-z0-9][\w-]*)*", _keep),
    (rf"@{_L}[\w]*|#{_L}{_W}*|[CcFf]#|[Cc]\+\+", _keep),
)
_WORDS: tuple[tuple[str, Render], ...] = (
    (rf"{_WORD}n{_APOSTROPHE}t{_END}|n{_APOSTROPHE}t{_END}", _negation),
    (rf"{_WORD}N{_APOSTROPHE}T{_END}|N{_APOSTROPHE}T{_END}", _negation),
    (rf"(?i:{_APOSTROPHE}(?:tis|twas)){_END}|{_WORD}", _word),
    (rf"(?i:{_APOSTROPHE}(?:s|m|d|re|ll|ve|em|til|till|cause)){_END}", _keep),
    (rf"{_APOSTROPHE}[nN](?:{_APOSTROPHE}|(?![\w\"”]))|{_APOSTROPHE}\d\ds?(?![\w'’\"”])", _keep),
    (rf"(?i:[dlno]{_APOSTROPHE}{_L}{{2,}}|{_L}+[aeiouy]{_APOSTROPHE}[aeiou]{_L}*|e'er|s'mores|c'est){_END}", _keep),
    (rf"(?i:[dljy]|ol){_APOSTROPHE}(?={_L})|(?i:[dl]){_APOSTROPHE}", _keep),
    (rf"{_L}+[!?]{_L}+", _keep),
)
_JOINED_WORDS: tuple[tuple[str, Render], ...] = (
    (rf"{_WORD}(?:[-_‑‐]{_WORD})+", _keep),
    (rf"[A-Za-z0-9]+{_HYPHENS}(?:/[A-Za-z0-9]+{_HYPHENS}){{1,2}}", _keep),
    (r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+", _keep),
    (r"[A-Z]+(?:&(?:amp;)?[A-Z]+)+", _keep),
)
_NUMBERS: tuple[tuple[str, Render], ...] = (
    (_NUMBER, _keep),
    (r"\(\d{3}\) ?\d{3}-\d{4}|\d{1,4}[- ]\d{1,4}/\d{1,4}(?!\d)", _keep),
)
_PERIODS: tuple[tuple[str, Render], ...] = (
    (rf"{_DOTTED}(?:-{_WORD})*", _keep),
    (rf"{_L}(?:\.{_L})+\.(?:-{_WORD})*{_END}", _keep),
    (rf"{_L}\.(?!\s+(?:{_SENTENCE_STARTS}|{_SENTENCE_STARTS.upper()})(?:\s|$))", _keep),
    (rf"(?i:ph\.d|{_ABBREVIATIONS})\.|(?i:{_NUMBERING})\.(?=\s?\d)", _keep),
    (rf"(?:{_CAPITALISED_ABBREVIATIONS}|{_CAPITALISED_ABBREVIATIONS.upper()})\.|{_L}+\.(?=[,;:])", _keep),
)
_OTHER: tuple[tuple[str, Render], ...] = (
    (r"(?:A|C|R|US|HK|NT|AU)?\$", _keep),
    (r"&(?:amp|lt|gt);|[£€¢½¼¾⅓⅔]", _symbol),
    (r"&(?:quot|nbsp|apos);", _drop),
    (r"&#\d+;", _keep),
    (r">?[:;=][-o']?[()DPpO|\\3](?!\w)", _keep),
    (r"[:;=]\]", lambda smiley: (smiley,)),
    (r"[?!]+|_+|\*+|##+|<<|>>|\^_+\^|-{5,}|[()\[\]{}]", _keep),
    (r"[²³¹⅛⅜⅝⅞]|[^\w\s\"'`“”‘’‛«»‹›「」…‐‑\-–—―\U00010000-\U0010ffff\u200b-\u200f\ufe00-\ufe0f\u20e3‼⁉]", _keep),
)
_RULES = tuple(
    (re.compile(pattern), render)
    for pattern, render in (
        *_BLANKS_AND_QUOTES,
        *_LINKS,
        *_WORDS,
        *_JOINED_WORDS,
        *_NUMBERS,
        *_PERIODS,
        *_OTHER,
    )
)
