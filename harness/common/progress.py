"""Progress bars: on every long part, gone when it ends, silent where stderr is no terminal."""

from functools import partial

from tqdm import tqdm

progress = partial(tqdm, disable=None, leave=False)
