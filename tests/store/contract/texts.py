"""Texts that are hard on whoever takes them for more than data."""

HARD_TEXTS = [
    "",
    " ",
    "'",
    '"',
    "\\",
    "a'; DROP TABLE documents; --",
    '$."x"',
    "%_*?",
    "a.b",
    "`",
    "null",
    "1",
    "true",
    "\n\r\t",
    "nul\0inside",
    "é\u0301 日本語 🙂",
    "\u2028\ufeff",
    "x" * 5000,
]
