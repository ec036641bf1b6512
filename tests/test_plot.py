"""Pictures say what the layouts and masks say."""

import jax
import numpy as np
import pytest

import ring_jax
from ring_jax import plan, plot
from ring_jax.layout import as_layout


def test_strips_have_a_rank_a_cell():
    figure = plot.layouts(64, 4, ("zigzag", ring_jax.Striped()))
    for axis, name in zip(figure.axes, ("zigzag", "striped"), strict=True):
        colours = axis.images[0].get_array()[0]
        owner = np.asarray(as_layout(name).rank_of(np.arange(64), 64, 4))
        seen = [np.unique(colours[owner == rank], axis=0) for rank in range(4)]
        assert all(len(each) == 1 for each in seen)
        assert len(np.unique(np.concatenate(seen), axis=0)) == 4


def test_a_matrix_is_the_mask():
    mask = ring_jax.causal() & ring_jax.window(5, 0)
    image = plot.mask(mask, 32, layout="zigzag", ranks=2).axes[0].images[0].get_array()
    query, key = np.indices((32, 32))
    assert ((image < 1).any(axis=-1) == ((key <= query) & (query - key <= 5))).all()


def test_work_is_a_share_of_the_mean():
    figure = plot.work(64, 4, names=("contiguous", "zigzag"))
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert max(widths) == pytest.approx(904 / 520) and widths.count(pytest.approx(1.0)) == 4
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_picture_of_the_main_job(ranks, tmp_path):
    plot.ranks(100, ranks, mark=(99, 10, "here"), path=tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_timeline_is_as_long_as_the_group():
    found = plan.predict("qwen3.5-9b", tokens=1 << 17, mesh={"context": 8}).prefill
    axis = plot.timeline(found).axes[0]
    assert axis.get_xlim()[1] == pytest.approx(1e3 * sum(piece.seconds for piece in found.group))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["kernels", "NVLink"]


def test_values_show_themselves_in_a_notebook():
    # Newer versions of jax make explicit axes unless told otherwise, and say so.
    mesh = jax.sharding.AbstractMesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
    shown = context._repr_html_()
    assert shown.count("<rect") == 64 and "Zigzag" in shown and "Mesh(context=4)" in shown
    assert "<svg" not in ring_jax.ContextParallel("context")._repr_html_()
    mask = (ring_jax.causal() & ring_jax.documents(cu_seqlens=np.array([0, 3, 10])))._repr_html_()
    assert "10 queries" in mask and mask.count("fill='#2563eb'") == 6 + 28
    traced = []
    jax.jit(lambda n: traced.append(ring_jax.lengths(n)._repr_html_()) or n)(jax.numpy.array([3]))
    assert "<svg" not in traced[0]
    assert ring_jax.Striped(block=4)._repr_html_().count("<rect") == 96
