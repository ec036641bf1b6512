"""Numbers and sizes of the heads of a GDN layer."""

import dataclasses
from dataclasses import dataclass

from ring_jax._arrays import round_up
from ring_jax._checks import check_count

_ALIGNED = 8  # numbers of 16 bits


@dataclass(frozen=True)
class Heads:
    """Numbers and sizes of heads."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_count(f"Heads({field.name}=...)", getattr(self, field.name), 1)

    @property
    def parts(self) -> tuple[int, int, int]:
        """Features of q, k and v."""
        keys = self.key_heads * self.key_size
        return keys, keys, self.value_heads * self.value_size

    @property
    def features(self) -> int:
        """Features of the convolution, q | k | v."""
        return sum(self.parts)

    @property
    def shared(self) -> int:
        """Value heads that share a key head."""
        return self.value_heads // self.key_heads

    @property
    def of_key_head(self) -> tuple[int, ...]:
        """Features of q, k, v, z, b and a of one key head and its value heads, where projections lie head by head."""
        values = self.shared * self.value_size
        return self.key_size, self.key_size, values, values, self.shared, self.shared

    @property
    def stride(self) -> int:
        """Columns of one key head in such projections: `of_key_head` and zeros, so that each head begins where 16 bytes do."""
        return round_up(sum(self.of_key_head), _ALIGNED)

    def share(self, ranks: int) -> "Heads":
        """Those of one rank of `ranks`."""
        check_count("ranks", ranks, 1)
        if self.key_heads % ranks or self.value_heads % ranks:
            raise ValueError(
                f"{self.key_heads} key heads and {self.value_heads} value heads do not divide over {ranks} ranks: use fewer"
            )
        return dataclasses.replace(self, key_heads=self.key_heads // ranks, value_heads=self.value_heads // ranks)
