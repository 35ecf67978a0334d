"""How the colours of the sets of evidence.py go with their shapes, by which --colour auto decides; a few minutes.

    python benchmarks/colours.py DIR                # DIR as for evidence.py; a line for each set

Also for random draws of fewer images: in how many of them colours and shapes count as independent.
"""

import dataclasses
from pathlib import Path

import torch
import tyro
from evidence import SETS

from scott_sparse.data.colour import colour_agreement
from scott_sparse.training.recipe import parse
from scott_sparse.training.run import open_images

COUNTS = (300, 600, 1000, 2000)
DRAWS = 20


@dataclasses.dataclass(frozen=True)
class Settings:
    sets: tyro.conf.Positional[Path]
    """Folder of the sets."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    print(f"| set | told by | agreement | {' | '.join(f'{count:,}' for count in COUNTS)} |")
    print("|---" * (3 + len(COUNTS)) + "|")
    generator = torch.Generator().manual_seed(0)
    for name, (told_by, flags) in SETS.items():
        _, recipe = parse(["small-data", *(flag.format(sets=settings.sets) for flag in flags)])
        images = open_images(recipe).pretrain
        agreement, shares = colour_agreement(images), []
        for count in COUNTS:
            draws = (torch.randperm(len(images), generator=generator)[:count] for _ in range(DRAWS))
            counted = sum(colour_agreement(images[draw]).independent for draw in draws)
            shares.append(f"{counted} of {DRAWS}" if count < len(images) else "")
        measured = f"{100 * agreement.mean:.1f} ± {100 * agreement.error:.1f} % of {agreement.images:,}"
        print(f"| {name} | {told_by} | {measured} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
