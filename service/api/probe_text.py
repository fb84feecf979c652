"""What a quantized model and its original read when they are compared: prose, code, facts and numbers.

The first tokens of each text are used, so each begins with what it is about.
"""

from __future__ import annotations

from typing import Final

_PROSE: Final = """\
The ferry left the harbour a little after six, while the lamps along the quay were still burning. On the upper deck \
an old woman had spread a newspaper over her knees and was peeling an orange, slowly and all in one piece, as if \
there were a prize for it. "You will see the island in an hour," she said to the boy beside her, "but only if the fog \
lifts." He nodded and said nothing. Behind them the town grew small: first the windows went, then the houses, and at \
last the hill itself, until nothing was left of it but the sound of a bell. Nobody knew who rang it. It had been rung \
every morning for longer than the church books went back, and on the one day on which it was silent, in the winter of \
the great frost, three boats had not come home.
"""
_CODE: Final = '''\
def median(values: list[float]) -> float:
    """Return the middle of the sorted values, or the mean of the two in the middle."""
    if not values:
        raise ValueError("median() needs at least one value")
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2


for name, times in sorted(results.items(), key=lambda item: median(item[1])):
    print(f"{name:<20} {median(times) * 1000:8.2f} ms")
'''
_FACTS: Final = """\
Water boils at 100 degrees Celsius at sea level, and at about 93 degrees at an altitude of 2,000 metres, because the \
pressure of the air falls with height. The capital of France is Paris; the capital of Australia is Canberra, not \
Sydney. A year has 365 days, and a leap year one more: years that 4 divides are leap years, unless 100 divides them \
and 400 does not. Question: how many legs have three spiders and two dogs? Answer: a spider has eight legs and a dog \
has four, so together they have 3 * 8 + 2 * 4 = 32 legs.
"""
_NUMBERS: Final = """\
{"order": 40817, "date": "2024-03-18", "items": [{"name": "bolt M8 x 40", "count": 250, "price": 0.12}, \
{"name": "washer", "count": 500, "price": 0.03}], "total": 45.00, "paid": true, "note": null}
| month | rain (mm) | mean (C) |
|---|---|---|
| January | 61.4 | 1.8 |
| February | 48.0 | 2.9 |
| March | 52.7 | 6.3 |
1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144; 2, 4, 8, 16, 32, 64, 128; 12 + 30 = 42, 7 * 8 = 56, 81 / 9 = 9.
"""

PROBE_TEXTS: Final = (_PROSE, _CODE, _FACTS, _NUMBERS)
"""Written for this purpose; of none of them is a model likely to know the continuation by heart."""
