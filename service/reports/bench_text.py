"""A text that prompts are made of, and on which two servers are compared, where no other is given."""

from __future__ import annotations

from typing import Final

DEFAULT_TEXT: Final = """\
The house at the end of the lane had stood empty for so long that nobody in the village could say with certainty \
whose it was. Some held that it belonged to a lawyer in the town, who had bought it for a debt and never seen it; \
others, that the last of the family had gone to sea and would come back one day with a beard and a parrot to ask for \
his keys. The children, who knew better, said that it belonged to the owls.

It was therefore a matter of some interest when, on a wet morning in October, smoke was seen to rise from the taller \
of its two chimneys. Mrs. Garland saw it first, because she rose first, and by eight o'clock she had told the baker, \
who told the carrier, who told everybody between the bridge and the mill. By noon there was hardly a kitchen in \
which the smoke had not been discussed, and by four o'clock the vicar, who was a mild man and disliked to be the \
last to know a thing, put on his old coat and walked up the lane to see for himself.

The gate was open. He went through the long grass, past the pump and the broken bench, and knocked. For a while \
nothing happened. Then a window was pushed up over his head, and a young woman with a smear of soot across her cheek \
looked down at him as if he were the one thing that the day had still lacked.

"If you have come about the owls," she said, "they are in the attic, and they may stay there. If you have come about \
the rent, I have paid it. And if you have come about the chimney, I should be very much obliged to you, for I do not \
think that it has been swept since the old king died."

"I have come," said the vicar, who found that he had taken off his hat, "to ask whether there is anything that you \
need."

She considered this. The rain ran down the roof and dripped from the gutter on either side of him. "Coal," she said \
at last, "and a cat, and somebody who knows how to mend a clock. I have four clocks, and each of them has an opinion \
of its own. I should not mind if they were all wrong together, but I cannot live in a house where it is always four \
different times at once."

He told her that the sexton mended clocks, when he was sober, and that there was never any want of cats; and he \
promised to speak to the coal merchant in the morning. It was only when he had reached the bridge again, wet through \
and curiously cheerful, that it came to him that he had not asked for her name. He stood still for a moment and \
looked back. The smoke was rising straight and grey above the trees, and behind one of the lower windows somebody \
had lit a lamp.

"Well?" said his wife, when he came in. "Who is it?"

"I do not know," said the vicar. "But she has four clocks, and she means to stay."

His wife put down her needle. She had been married to him for thirty years, and she knew that there were questions \
to which he would bring home no answer, however plainly they were put to him beforehand. She took the wet coat from \
him and hung it by the fire, and set the kettle on, and said nothing more; but the next day, when the coal was sent \
up the lane, there was a basket on top of the sacks, with a loaf in it, a jar of plums, and a small black cat, \
asleep.
"""
