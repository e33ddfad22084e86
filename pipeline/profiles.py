"""What an operator would set by hand for a GPU's memory: launch flags and graph inputs, from one small table.

Pure.  Who measures the memory is ``devices``; who starts engines with the flags is ``engine``.  The numbers
come from the sizes of the weights (14B in fp8: 16 GB, text encoder 7 GB, the rest 3 GB) and from the
wrapper's published graphs (20 blocks swapped at 24 GB); none was tried on a real GPU by us yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Profile:
    """How much is kept on the GPU."""

    name: str
    least_gb: float
    """The smallest memory of a GPU, in GiB, that it is chosen for; a "24 GB" card reports a little less."""
    flags: tuple[str, ...]
    """ComfyUI's own words for it."""
    blocks_to_swap: int
    """Wrapper family: transformer blocks, of 40, that wait in the machine's memory."""
    force_offload: bool
    """Wrapper family: the model leaves the GPU before frames are decoded."""


PROFILES = (
    Profile("80gb", 72, ("--highvram",), 0, False),
    Profile("48gb", 44, ("--highvram",), 0, False),
    Profile("32gb", 30, (), 10, True),
    Profile("24gb", 22, ("--reserve-vram", "1.0"), 20, True),
    Profile("small", 8, ("--lowvram",), 40, True),
    Profile("tiny", 0, ("--novram",), 40, True),
)
"""From the largest to the smallest."""

MEMORY_FLAGS = frozenset(
    {"--gpu-only", "--highvram", "--normalvram", "--lowvram", "--novram", "--reserve-vram", "--cpu"}
)
"""Flags with which an operator has chosen already."""


def profile_for(memory_gb: float) -> Profile:
    """The largest profile that a GPU with so many GiB can have.

    >>> [profile_for(gb).name for gb in (79.1, 47.5, 31.4, 23.6, 15.7, 6)]
    ['80gb', '48gb', '32gb', '24gb', 'small', 'tiny']
    """
    return next(profile for profile in PROFILES if memory_gb >= profile.least_gb)


def named(name: str) -> Profile:
    """The profile of that name; raises ``ConfigurationError`` listing all."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    known = ", ".join(profile.name for profile in PROFILES)
    raise ConfigurationError(f"INFINITETALK_PROFILE={name}: there is no such profile; there are {known}")


def advice(width: int, height: int) -> str:
    """What to do when even less on the GPU was too much.

    >>> advice(1280, 720)
    'what the sampler needs grows with the pixels: 912x512 has half of them; or take a GPU with more memory'
    """
    half = [max(64, round(side * 0.5**0.5 / 16) * 16) for side in (width, height)]
    size = f"{half[0]}x{half[1]}"
    return (
        f"what the sampler needs grows with the pixels: {size} has half of them; "
        "or take a GPU with more memory"
    )


def smaller(profile: Profile) -> Profile | None:
    """The next profile that changes something for ComfyUI, None after the smallest.

    >>> smaller(PROFILES[0]).name, smaller(PROFILES[-1])
    ('32gb', None)
    """
    later = PROFILES[PROFILES.index(profile) + 1 :]
    return next((other for other in later if other.flags != profile.flags), None)
