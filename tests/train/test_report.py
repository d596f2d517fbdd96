"""`gossamer report`: every part of the page, from whole, unfinished, hostile and damaged runs."""

import csv
import errno
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from gossamer.train import cli
from gossamer.train.folder import RunFolder
from gossamer.train.html import draw, page
from gossamer.train.html.draw import Curve, plot
from gossamer.train.html.runs import COLOURS, names

# Lightning 2.6 on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

TINY = ["--model", "vgg-small", "--width", "0.25", "--epochs", "2", "--lr", "0.05"]
TINY += ["--density", "0.2", "--channel_sparsity", "0.4", "--min_channels", "2", "--threads", "1"]
VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """What is on a page; fails where a tag is not closed, or closes what is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.attributes, self.shown = [], [], [], []
        self.tags = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.shown.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.shown).split())


def run(*words):
    return cli.main([str(word) for word in words])


def fails(capsys, code, *words):
    """The one line of error that a command ends with."""
    assert run(*words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gossamer: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with its dense twin, made and analysed on the command line."""
    folder = tmp_path_factory.mktemp("report") / "chase"
    with pytest.MonkeyPatch.context() as patch, (folder.parent / "out").open("w") as out:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", out)
        assert run("train", *TINY, "--baseline", "--out", folder) == 0
        shutil.copy(folder / "report.html", folder.parent / "of-train.html")
        assert run("report", folder) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run that may be spoilt."""
    return shutil.copytree(finished, tmp_path / "chase")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def change(path, **values):
    """Set values in a YAML or JSON file."""
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def break_off(folder, epochs=9):
    """Make the run one that has not ended."""
    for name in ("summary.json", "model.safetensors", "analysis.json", "metrics-dense.csv"):
        (folder / name).unlink()
    change(folder / "config.yaml", epochs=epochs, baseline=False)


@pytest.fixture
def undrawn(monkeypatch):
    """Drawings are left empty, which is quicker, where only words are looked at."""
    monkeypatch.setattr(draw, "svg", lambda drawing: "<svg/>")


# ------------------------------------------------------------------ one run


def test_every_part_is_there(finished):
    found = Page((finished / "report.html").read_text())
    summary = json.loads((finished / "summary.json").read_text())
    dense, sparse, slim = (summary[name] for name in ("dense", "sparse", "slim"))
    for part in (
        "vgg-small on digits, chase, seed 0",
        f"accuracy {slim['accuracy']:.2%} dense twin {dense['accuracy']:.2%}",
        f"MACs executed {slim['macs_executed'] / dense['macs_executed']:.3f}x of dense",
        f"bytes on disk {slim['bytes_on_disk'] / dense['bytes_on_disk']:.3f}x of dense",
        f"density {sparse['density']:.4f} channel sparsity {slim['channel_sparsity']:.4f}",
        f"{slim['nonzeros']:,} ({slim['nonzeros'] / dense['nonzeros']:.3f}x)",
        "Slim and sparse differ by at most",
        "SAD from the start: ",
        "Accuracy dense twin, validation validation training",
        "Density of the sparse layers",
        "Live channels",
        "SAD: how far the supports moved from the start since the epoch before",
        "Exploration ever kept churn revived",
        "all channels kept: classifier - they are an output of the model",
        "of each layer's channels hold",
        "Spread of channel density, over chance",
        "Weights held by the sparsest channels, at the end",
        "If the weakest channels went now change of the outputs, relative",
        "gossamer train --config config.yaml --out runs/again",
        "channel_sparsity: 0.4",
        "gossamer.load('model.safetensors', build_model('vgg-small'",
        f"torch {summary['versions']['torch']}",
        summary["machine"]["platform"],
        "interleaved rounds by the wall clock: eager PyTorch",
        "digits: 1,294 training, 144 validation and 359 test images, 10 classes",
        "what masks alone deliver",
        "hardware that skips every zero would run",
    ):
        assert part in found.text, part
    assert found.tags.count("svg") == 10
    bars = [value for name, value in found.attributes if name == "class" and value == "rail"]
    assert len(bars) == 2 * 6  # five figures and the latency, of two networks


def test_layers_before_and_after(finished):
    found = Page((finished / "report.html").read_text()).text
    rows = rows_of(finished / "layers.csv")
    layers = json.loads((finished / "summary.json").read_text())["layers"]
    assert [row["layer"] for row in layers] == list(dict.fromkeys(row["layer"] for row in rows))
    cut = 0
    for row in layers:
        start = next(float(x["density"]) for x in rows if x["layer"] == row["layer"])
        before, after = row["shape"][0], row["slim_shape"][0]
        shapes = "x".join(map(str, row["shape"]))
        told = f"{row['layer']} {before} to {after} {start:.4f} to {row['density']:.4f} "
        told += f"{row['slim_density']:.4f} "
        told += f"{row['slim_macs_executed'] / row['macs_executed']:.3f}x {shapes}"
        assert told in found
        cut += before - after
    assert cut > 0


def test_the_page_loads_nothing_and_its_ids_are_unique(finished):
    text = (finished / "report.html").read_text()
    assert text.isascii()
    assert text.startswith("<!doctype html>\n")
    assert len(text) < 200_000
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert len(found.ids) == len(set(found.ids)) >= 10
    used = [value.removeprefix("#") for name, value in found.attributes if name == "href"]
    used += re.findall(r"url\(#([^)]+)\)", text)
    assert used
    assert set(used) <= set(found.ids)
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", text))
    assert "#00fe" not in text  # what stands for a colour is not one


def test_the_same_files_give_the_same_bytes(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "elsewhere" / "chase")
    assert page([copy]) == (finished / "report.html").read_text()


def test_train_writes_the_page(finished):
    text = (finished.parent / "of-train.html").read_text()
    assert "was not computed: gossamer analyze RUN does" in Page(text).text
    assert Page(text).tags.count("svg") == 9
    analysis = finished / "analysis.json"
    hidden = analysis.rename(finished / "hidden.json")
    try:
        assert page([finished]) == text
    finally:
        hidden.rename(analysis)


def test_a_budget_is_marked(undrawn, copied):
    row = {"unit": "MACs", "budget": 50, "dense": 100, "predicted": 47, "measured": 48}
    change(copied / "summary.json", budgets={"macs": row}, refused=["features.3, 2 channels"])
    found = Page(page([copied]))
    assert "Budget of 50 MACs (0.500 of dense, 100): met with 48" in found.text
    assert "mark: budget, 0.500x" in found.text
    assert "Not cut, it would have been slower: features.3, 2 channels." in found.text
    assert ("style", "left: 50.00%") in found.attributes


# ------------------------------------------------------------------ what is missing


def test_without_a_dense_twin(undrawn, copied):
    (copied / "metrics-dense.csv").unlink()
    summary = json.loads((copied / "summary.json").read_text())
    del summary["dense"], summary["latency"]["ratio"]["dense"]
    (copied / "summary.json").write_text(json.dumps(summary))
    found = Page(page([copied])).text
    assert "No dense twin was trained (gossamer train --baseline true does)." in found
    assert "the latency has nothing to be held against" in found
    assert f"latency {summary['slim']['latency_ms']:.3f} ms" in found
    assert "dense twin, validation" not in found


def test_without_channels_and_without_a_moving_support(undrawn, copied):
    """As a static mask leaves its files."""
    for name in ("metrics.csv", "layers.csv"):
        rows = rows_of(copied / name)
        still = {"density": 0.2, "sad_from_start": 0, "sad_since_last": 0, "exploration": 0.2}
        still |= {"churn": 0, "revived": 0}
        still |= {"live_channels": 5, "channel_spread_random": 0} if name == "layers.csv" else {}
        RunFolder(copied).write_rows(copied / name, [row | still for row in rows])
    found = Page(page([copied])).text
    layers = json.loads((copied / "summary.json").read_text())["layers"]
    assert "The density stayed at 0.2000." in found
    assert f"All {5 * len(layers)} output channels of the sparse layers stayed alive" in found
    assert "The supports stayed as they were at the start: SAD is 0." in found
    assert "Exploration stayed at 0.2000: no weight was ever grown." in found
    assert "Spread of channel density, over chance: not known" in found
    for title in ("Live channels", "Exploration ever kept", "SAD: how far"):
        assert title not in found


def test_a_run_that_has_not_ended(undrawn, copied):
    break_off(copied)
    found = Page(page([copied]))
    assert "This run has not ended: 2 of 9 epochs. To go on: gossamer train" in found.text
    assert f" --resume --out {copied}" in found.text
    assert "Accuracy validation training" in found.text
    assert "layer live channels density" in found.text
    assert "at the end: there is no slim network yet." in found.text
    assert "Machine and versions are known when the run has ended." in found.text
    assert "Against dense" not in found.text
    assert found.tags.count("svg") == 8

    for name in ("metrics.csv", "layers.csv"):
        (copied / name).unlink()
    found = Page(page([copied]))
    assert "No epoch has ended yet: there is no curve to draw." in found.text
    assert "Nothing is known of the layers yet." in found.text
    assert "svg" not in found.tags


def test_a_summary_from_before_it_had_layers(undrawn, copied):
    summary = json.loads((copied / "summary.json").read_text())
    del summary["layers"]
    (copied / "summary.json").write_text(json.dumps(summary))
    found = Page(page([copied])).text
    assert "layer live channels density" in found
    assert "or the summary's list of layers is not in the run folder." in found


# ------------------------------------------------------------------ several runs


@pytest.fixture
def three(finished, tmp_path):
    """The run, one with another rate, one that has not ended."""
    others = [shutil.copytree(finished, tmp_path / name) for name in ("warmer", "young")]
    change(others[0] / "config.yaml", lr=0.3)
    break_off(others[1])
    return [finished, *others]


def test_several_runs_side_by_side(three):
    text = page(three)
    found = Page(text)
    assert "3 runs side by side" in found.text
    slim = json.loads((three[0] / "summary.json").read_text())["slim"]
    accuracy = f"{slim['accuracy']:.2%}"
    assert f" accuracy {accuracy} {accuracy} - " in found.text
    assert "state done done not ended" in found.text
    assert "epochs 2 of 2 2 of 2 2 of 9" in found.text
    assert "Settings that differ chase warmer young epochs 2 2 9" in found.text
    assert "lr 0.05 0.3 0.05" in found.text
    overlaid = "chase dense twin of chase warmer dense twin of warmer young"
    assert f"Accuracy, validation {overlaid} " in found.text
    assert f"Loss, validation {overlaid} " in found.text
    assert "SAD: how far the supports moved, from the start chase warmer young" in found.text
    assert "No dense twin of young was trained" in found.text
    assert "young: This run has not ended: 2 of 9 epochs." in found.text
    assert len(found.ids) == len(set(found.ids))
    assert {"c1", "c2", "c3"} < set(found.ids)
    assert not re.search(r"<svg((?!</svg>).)*(warmer|features)", text, re.DOTALL)  # no names
    assert len(text) < 500_000


def test_names_are_as_long_as_it_takes(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    assert names(paths) == ["a/run", "b/run", "b/other"]
    assert names([Path("runs/x"), Path("runs/y")]) == ["x", "y"]
    with pytest.raises(ValueError, match=r"run is there twice: give each run once"):
        names([tmp_path / "run", tmp_path / "other", tmp_path / "b" / ".." / "run"])


def test_no_more_runs_than_can_be_told_apart(tmp_path):
    with pytest.raises(ValueError, match="9 runs for one page: give 1 to 8, which can be told"):
        page([tmp_path / str(number) for number in range(len(COLOURS) + 1)])


# ------------------------------------------------------------------ hostile and damaged


HOSTILE = "<script>alert('$x$')</script>&\"{{ 7 * 7 }}"


def test_names_are_escaped(undrawn, finished, tmp_path):
    """Drawings hold no names at all: what they say is written in `draw` and `curves`."""
    folder = shutil.copytree(finished, tmp_path / HOSTILE.replace("/", "_"))
    change(folder / "config.yaml", model=HOSTILE, data=HOSTILE, include=[HOSTILE])
    for name in ("layers.csv", "summary.json", "analysis.json"):
        text = (folder / name).read_text()
        quoted = HOSTILE.replace('"', '""')
        own = f'"{quoted}"' if name == "layers.csv" else json.dumps(HOSTILE)[1:-1]
        (folder / name).write_text(text.replace("features.3", own))
    change(folder / "summary.json", locked={HOSTILE: HOSTILE}, forecast=HOSTILE)
    for runs in ([folder], [folder, finished]):
        text = page(runs)
        assert "<script" not in text
        assert "&lt;script&gt;alert(&#39;$x$&#39;)&lt;/script&gt;&amp;&#34;{{ 7 * 7 }}" in text
        found = Page(text)
        assert "script" not in found.tags
        assert f"{HOSTILE} on {HOSTILE}, chase, seed 0" in found.text
        assert f"all channels kept: {HOSTILE} - {HOSTILE}" in found.text
        assert f"{HOSTILE} 8 to" in found.text
        assert not [name for name, _ in found.attributes if name.startswith("on")]


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("config.yaml", None, "holds no run: give the folder that `gossamer train` wrote"),
        ("config.yaml", "model: [", "is not YAML"),
        ("config.yaml", "model: x", "lacks baseline, data, epochs, method, seed"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", "[1]", "summary.json is damaged (it holds a list, wanted an object)"),
        ("summary.json", "{}", "do not fit together (KeyError: 'slim')"),
        ("summary.json", '{"slim": 5, "reference": {}}', "do not fit together"),
        ("metrics.csv", "epoch,val_loss\n1,much\n", "metrics.csv is damaged"),
        ("metrics.csv", "epoch,val_loss\n1\n", "metrics.csv is damaged"),
        ("metrics.csv", "val_loss\n1\n", "do not fit together (KeyError: 'epoch')"),
        ("layers.csv", "epoch,layer\n0,a\n", "do not fit together (KeyError: "),
        ("analysis.json", "{}", "do not fit together (KeyError: 'cuts')"),
        ("model.safetensors", "no", "model.safetensors is damaged"),
    ],
)
def test_damaged_files(undrawn, copied, capsys, file, text, told):
    if text is None:
        (copied / file).unlink()
    else:
        (copied / file).write_text(text)
    before = (copied / "report.html").read_text()
    assert told in fails(capsys, 1, "report", copied)
    assert (copied / "report.html").read_text() == before


def test_values_that_are_no_numbers_are_left_out(copied):
    """As a run leaves them whose loss has gone to infinity."""
    rows = rows_of(copied / "metrics.csv")
    for row, value in zip(rows, ("nan", "inf"), strict=True):
        row |= {"val_loss": value, "train_loss": value}
    RunFolder(copied).write_rows(copied / "metrics.csv", rows)
    found = Page(page([copied]))
    assert found.tags.count("svg") == 10
    assert "nan" not in found.text


# ------------------------------------------------------------------ long runs and large networks


def test_a_large_network_trained_for_long_stays_small(copied):
    """54 layers, 200 epochs: the curves are thinned out, and say so."""
    layers = json.loads((copied / "summary.json").read_text())["layers"]
    rows = rows_of(copied / "layers.csv")
    epochs = rows_of(copied / "metrics.csv")
    kinds = [f"stage{n // 9}.block{n // 3}.convolution{n}" for n in range(54)]
    grown = [
        {**rows[epoch % 7], "epoch": epoch, "layer": name, "channel_spread": 0.2 + epoch / 999}
        for epoch in range(201)
        for name in kinds
    ]
    RunFolder(copied).write_rows(copied / "layers.csv", grown)
    many = [{**epochs[n % 2], "epoch": n + 1, "val_accuracy": n / 200} for n in range(200)]
    RunFolder(copied).write_rows(copied / "metrics.csv", many)
    change(copied / "summary.json", layers=[layers[1] | {"layer": name} for name in kinds])
    text = page([copied])
    assert "The curves show 16 of 54 sparse layers" in Page(text).text
    assert all(name in text for name in kinds)  # in the table
    assert len(text) < 500_000


def test_thinned_curves_keep_their_ends():
    def line(points):
        drawing = str(plot("x", "Title", [Curve(label="", points=points, colour="c1")]).svg)
        (path,) = re.findall(r'd="([^"]+)"[^>]*stroke-width: 1.6', drawing)
        return re.findall(r"[ML] ([\d.]+) ", path)

    thin = line([(n, (n % 7) / 7) for n in range(5000)])
    assert len(thin) < 250
    assert [thin[0], thin[-1]] == line([(0, 0), (4999, 0.5)])


# ------------------------------------------------------------------ the command


def test_the_command(undrawn, finished, copied, tmp_path, capsys, monkeypatch):
    assert run("report", copied, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    out = copied / "report.html"
    assert told == {"runs": [str(copied)], "out": str(out), "bytes": out.stat().st_size}

    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "other")
    assert run("report", copied, "other", "--quick") == 0
    assert "written: report.html, " in capsys.readouterr().out
    assert run("report", copied, "--out", tmp_path / "new" / "page.html") == 0
    assert (tmp_path / "new" / "page.html").read_text() == out.read_text()

    assert run("report", "--help") == 0
    assert "gossamer report runs/digits-vgg-small-chase-s0" in capsys.readouterr().out
    assert "wrote" in fails(capsys, 1, "report", tmp_path / "nothing")


def test_a_finished_run_is_analysed_once(undrawn, copied, capsys):
    (copied / "analysis.json").unlink()
    assert run("report", copied, "--quick") == 0
    assert "was not computed" in (copied / "report.html").read_text()
    change(copied / "config.yaml", data="no-such-data")
    assert run("report", copied) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[0] == f"analysing the channels of {copied} (--quick leaves it out)"
    assert err[1].startswith(f"{copied} is shown without: ")
    assert "no-such-data" in err[1]


def test_a_page_is_whole_or_not_there(undrawn, copied, monkeypatch, capsys):
    before = (copied / "report.html").read_text()
    change(copied / "config.yaml", lr=7.0)

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in fails(capsys, 1, "report", copied)
    assert (copied / "report.html").read_text() == before
    assert not list(copied.glob(".report*"))


def test_a_new_run_removes_what_was_made_of_the_old(copied):
    folder = RunFolder(copied)
    folder.tensorboard.mkdir()
    assert folder.page.exists()
    folder.clear()
    assert list(copied.iterdir()) == []
