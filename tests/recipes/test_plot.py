"""The picture of a run: lines that can be told apart."""

from types import SimpleNamespace

from matplotlib.figure import Figure

from nemotron_v3.recipes.plot import plot_loss


def test_every_line_has_a_colour_and_a_pattern_of_its_own(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path))
    )
    steps = [SimpleNamespace(tokens=100, loss=3.0 - n / 10) for n in range(9)]
    plot_loss(steps, 3.0, {"this model": 1.2, "xz -9": 1.5, "gzip -9": 1.9}, tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    labelled = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label().split(":")[0] for line in labelled] == [
        "training", "held out, this model", "held out, xz -9", "held out, gzip -9",
    ]  # fmt: skip
    assert len({line.get_color() for line in labelled}) == 4
    held_out = [line.get_linestyle() for line in labelled[1:]]
    assert len(set(held_out)) == 3
    assert (tmp_path / "loss.png").stat().st_size > 10_000
