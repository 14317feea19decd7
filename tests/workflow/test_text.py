"""Text to image through the real DAG: tiny random pipelines of SD 1.5, SDXL and SD3, rows of Table 4, all metrics."""

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from dmd2.core.run import RunId
from dmd2.data.captions import captions_of
from dmd2.data.emoji import FONT
from dmd2.method.samplers import few_step
from dmd2.networks.condition import Condition
from dmd2.publish.diffusers_folder import export
from dmd2.training.snapshot import find_snapshot
from tests import tiny_flow_pipelines, tiny_pipelines
from tests.eval.test_clip import write_model
from tests.workspace import Workspace, copy_repository

SIDE = tiny_pipelines.FACTOR * tiny_pipelines.LATENTS
CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "house", "beach")]
TABLE_4 = ["4step-no-gan", "4step-no-dm", "4step-no-backsim", "4step"]
TABLES = ["sd15-tiny-table4", "sdxl-tiny-table4", "sdxl-tiny-more", "sd35-medium-tiny-table4"]
METRICS = ["fd", "patch_fd", "clip_score", "saturation", "sharpness"]
ONE_STEP = {"generator.input": "noise", "generator.steps": 1, "generator.time": 399.0}
WARMUP = {
    **ONE_STEP, "dm.weight": 0.0, "gan.lambda_g": 0.0, "gan.lambda_d": 0.0, "critic.denoise_weight": 0.0,
    "critic.ratio": 1, "regression.weight": 1.0,
}  # fmt: skip


def _png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tars(folder: Path) -> dict[str, Any]:
    """The images in two tars, as web data comes."""
    folder.mkdir(parents=True)
    for part in range(2):
        with tarfile.open(folder / f"{part:05d}.tar", "w") as tar:
            for number in range(part * 6, part * 6 + 6):
                for name, content in (("png", _png(number)), ("txt", CAPTIONS[number].encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    return {"kind": "webdataset", "path": f"data/raw/{folder.name}/*.tar"}


def captioned(folder: Path) -> dict[str, Any]:
    """The images in a folder with metadata.jsonl."""
    folder.mkdir(parents=True)
    for number in range(len(CAPTIONS)):
        (folder / f"{number:04d}.png").write_bytes(_png(number))
    lines = [json.dumps({"file_name": f"{n:04d}.png", "text": caption}) for n, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"kind": "image-folder", "path": f"data/raw/{folder.name}"}


def shrunk(workspace: Workspace, base: str, source: dict[str, Any], rows: Any = "dmd2-table4", **changed: Any) -> None:
    """``BASE-tiny`` and its table: the shipped base with a tiny pipeline, eight images and four iterations."""
    name = f"{base}-tiny"
    values = yaml.safe_load((workspace.path / f"workflow/base/{base}.yaml").read_text())
    text = {**values["data"]["text"], "pipeline": {"name": name}, "prompts": "data/raw/prompts.txt", "jobs": 2}
    part = Path(values["teacher"]["source"]).name
    values["data"] |= {"name": name, "source": source, "resolution": 8, "channels": 4}
    values["data"]["text"] = {**text, "keep_images": True}
    values["teacher"] |= {"name": name, "source": f"data/pipelines/{name}/{part}", "network": None}
    values["generator"] = {"input": "backward_simulation", "steps": 4, "time": 999 if part == "unet" else 1.0}
    values["gan"]["head"] = "single"
    values["critic"]["ratio"] = 2
    pairs = {"count": 6, "shards": 2, "sampler": {**values["regression"]["pairs"]["sampler"], "steps": 3}}
    values["regression"] |= {"distance": "l2", "pairs": pairs}
    values["optim"] |= {"batch": 2, "warmup": 0, "lr": 1e-4, "states": "fp32"}
    values["train"] |= {"steps": 4, "init_from": None, "snapshot_every": 4, "checkpoint_every": 2, "log_every": 2}
    samplers = {key: {**sampler, "steps": 3} for key, sampler in values["eval"]["teacher_samplers"].items()}
    values["eval"] = {
        "metrics": METRICS, "detector": "lite0-112@64", "reference": name, "images": 8, "labels": "cyclic",
        "rounding": "trunc", "prompts": "data/raw/captions.txt", "clip": "clip-small", "draws": 1, "batch": 4,
        "shards": 1, "patch": {"geometry": "patch-16", "reference": name}, "teacher_samplers": samplers,
    }  # fmt: skip
    (workspace.path / f"workflow/base/{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    table = {
        "title": name,
        "base": name,
        "rows": rows,
        "metrics": METRICS,
        "teachers": {key: {} for key in samplers},
        **changed,
    }
    (workspace.path / f"workflow/tables/{name}-table4.yaml").write_text(yaml.safe_dump(table, sort_keys=False))


def shrunk_emoji(workspace: Workspace) -> list[str]:
    """The emoji with everything made here (autoencoder, teacher) in a few steps; no target where the font is missing."""
    if not FONT.exists():
        return []
    values = yaml.safe_load((workspace.path / "workflow/base/emoji.yaml").read_text())
    values["data"]["text"]["pipeline"]["autoencoder"]["train"] |= {"steps": 3}
    values["teacher"]["train"] |= {"steps": 3, "warmup": 1}
    values["optim"] |= {"batch": 2, "warmup": 0}
    values["train"] |= {"steps": 4, "snapshot_every": 4, "checkpoint_every": 4, "log_every": 2}
    samplers = {"cfg3": {"solver": "ddim", "steps": 3, "guidance": 3.0}}
    values["eval"] |= {"images": 8, "batch": 8, "clip": "clip-small", "teacher_samplers": samplers}
    (workspace.path / "workflow/base/emoji.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    table = {
        "title": "emoji",
        "base": "emoji",
        "metrics": METRICS,
        "rows": [{"run": "4step"}],
        "teachers": {"cfg3": {}},
    }
    for path in (workspace.path / "workflow/tables").glob("emoji-table*.yaml"):
        path.unlink()  # their teachers are of the whole base
    (workspace.path / "workflow/tables/emoji-tiny.yaml").write_text(yaml.safe_dump(table))
    return ["emoji-tiny"]


@pytest.fixture(scope="module")
def finished_text(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Both shapes run to their tables, SDXL's also in one step after its warm-up on pairs, and as a LoRA."""
    workspace = copy_repository(tmp_path_factory.mktemp("text"))
    data = workspace.path / "data"
    tiny_pipelines.sd15(data / "pipelines/sd15-tiny")
    tiny_pipelines.sdxl(data / "pipelines/sdxl-tiny")
    tiny_flow_pipelines.pipeline("sd3", data / "pipelines/sd35-medium-tiny")
    write_model(data / "weights/clip-small")
    shrunk(workspace, "sd15", captioned(data / "raw/folder"), [{"run": "4step"}])
    shrunk(workspace, "sdxl", tars(data / "raw/tars"), reference_row="4step", claims=["C13", "C14", "C15"])
    low_rank = {"run": "4step-lora", "change": {"generator.lora": {"rank": 2, "alpha": 1.0}}}
    warmup = {"run": "1step-warmup", "change": {**WARMUP, "generator.time": 1.0}}
    shrunk(
        workspace,
        "sd35-medium",
        {"kind": "webdataset", "path": "data/raw/tars/*.tar"},
        [{"run": "4step"}, low_rank, warmup],
    )
    (data / "raw/prompts.txt").write_text("two dogs\n\na painting of the beach\n")
    (data / "raw/captions.txt").write_text("\n".join(CAPTIONS[:5]))
    rows = [
        {"run": "1step-warmup", "change": WARMUP},
        {"run": "1step", "change": {**ONE_STEP, "train.init_from": "1step-warmup"}},
        low_rank,
    ]
    table = {"title": "one step", "base": "sdxl-tiny", "metrics": METRICS, "rows": rows}
    (workspace.path / "workflow/tables/sdxl-tiny-more.yaml").write_text(yaml.safe_dump(table))
    result = workspace.snakemake(*TABLES, *shrunk_emoji(workspace))
    assert result.returncode == 0, result.stderr[-6000:]
    return workspace


@pytest.mark.parametrize(
    ("base", "rows"),
    [("sd15", ["4step"]), ("sdxl", TABLE_4), ("sd35-medium", ["4step", "4step-lora", "1step-warmup"])],
)
def test_every_row_is_trained_sampled_and_measured(finished_text: Workspace, base: str, rows: list[str]) -> None:
    table = pd.read_csv(finished_text.path / f"results/tables/{base}-tiny-table4.csv")
    teachers = {run for run in table.run if run.startswith("teacher-")}
    assert set(table.run) == {*rows, *teachers} and len(teachers) == 2
    for run in table.run.unique():
        measured = table[table.run == run].set_index("metric").value
        assert set(METRICS) <= set(measured.index) and np.isfinite(measured[METRICS]).all()
    students = table[(table.metric == "fd") & table.run.isin(rows)]
    assert students.value.nunique() == len(rows)  # each switch made another student
    told = (finished_text.path / f"results/tables/{base}-tiny-table4.md").read_text()
    assert ("C14" in told) == (base == "sdxl")


def test_latents_text_states_and_captions_are_encoded_in_parts(finished_text: Workspace) -> None:
    fields_of = {"sd15-tiny": set(), "sdxl-tiny": {"pooled", "time_ids"}, "sd35-medium-tiny": {"pooled"}}
    for base, fields in fields_of.items():
        manifest = finished_text.path / f"data/real/{base}/manifest.json"
        shards = [load_file(manifest.with_name(f"part-{part:05d}-00000.safetensors")) for part in range(2)]
        assert [len(shard["images"]) for shard in shards] == [6, 6] and captions_of(manifest) == CAPTIONS
        assert set(shards[0]) == {"images", "pixels", "text"} | fields
        assert shards[0]["images"].shape[1:] == (4, 8, 8) and str(shards[0]["images"].dtype) == "torch.float16"
        assert (shards[0]["pixels"][0].permute(1, 2, 0).numpy() == np.asarray(Image.open(BytesIO(_png(0))))).all()


@pytest.mark.parametrize("base", ["sdxl-tiny", "sd35-medium-tiny"])
def test_pairs_are_the_teachers_latents_for_the_prompts_of_the_student(finished_text: Workspace, base: str) -> None:
    shards = sorted((finished_text.path / "data/pairs" / base).glob("*/shard-*.safetensors"))
    prompts = next((finished_text.path / "data/prompts").glob(f"{base}-prompts-*/prompts-00000.safetensors"))
    rows, known = [load_file(path) for path in shards], load_file(prompts)["text"]
    assert [len(shard["noise"]) for shard in rows] == [3, 3] and len(known) == 2
    for text in (text for shard in rows for text in shard["text"]):
        assert (known == text).all(dim=(1, 2)).any()


@pytest.mark.parametrize("run", ["4step", "4step-lora"])
def test_the_trained_transformer_makes_our_latents_in_diffusers_own_pipeline(
    finished_text: Workspace, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_text.path)
    snapshot = find_snapshot(RunId("sd35-medium-tiny", run, 0))
    export(snapshot, tmp_path / "out")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    pipe = StableDiffusion3Pipeline.from_pretrained("data/pipelines/sd35-medium-tiny", scheduler=scheduler)
    if run == "4step-lora":
        pipe.load_lora_weights(tmp_path / "out", weight_name="lora.safetensors")
    else:
        pipe.transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    student = snapshot.denoiser()
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    options = {"sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0, "output_type": "latent"}
    torch.manual_seed(3)
    theirs = pipe(CAPTIONS[0], latents=first, height=SIDE, width=SIDE, **options).images
    text, _, pooled, _ = pipe.encode_prompt(CAPTIONS[0], None, None, do_classifier_free_guidance=False)
    torch.manual_seed(3)  # the pipeline's noise between steps
    fresh, times = [torch.randn(1, 4, 8, 8) for _ in range(3)], student.schedule.step_times(4, 1.0)
    with torch.no_grad():
        ours = few_step(student, first, times, Condition(text=text, pooled=pooled), fresh.__getitem__)
    assert (theirs - ours).abs().max() < 1e-4 * max(1.0, float(ours.abs().max()))


def test_warm_up_trains_the_student_alone(finished_text: Workspace) -> None:
    runs = finished_text.path / "results/runs/sdxl-tiny"
    log = [json.loads(line) for line in (runs / "1step-warmup/seed0/log.jsonl").read_text().splitlines()]
    assert "student/regression" in log[-1] and not any(name.startswith("critic/") for name in log[-1])
    origin = json.loads((runs / "1step/seed0/train.json").read_text())["config"]
    assert origin["train"]["init_from"] == "1step-warmup" and origin["generator"]["time"] == 399


def test_low_rank_student_keeps_its_factors_beside_plain_weights(finished_text: Workspace) -> None:
    snapshot = next(
        (finished_text.path / "results/runs/sdxl-tiny/4step-lora/seed0").glob("snapshots-*/0000004.safetensors")
    )
    plain = next((finished_text.path / "results/runs/sdxl-tiny/4step/seed0").glob("snapshots-*/0000004.safetensors"))
    names = set(load_file(snapshot))
    assert {name for name in names if not name.startswith("lora.")} == set(load_file(plain))
    assert any(name.endswith("lora_up.weight") for name in names)


@pytest.mark.skipif(not FONT.exists(), reason=f"{FONT} is missing: apt-get install fonts-noto-color-emoji")
def test_emoji_run_with_an_autoencoder_and_a_guided_teacher_made_here(finished_text: Workspace) -> None:
    table = pd.read_csv(finished_text.path / "results/tables/emoji-tiny.csv")
    assert set(table.run) == {"4step", "teacher-cfg3"} and np.isfinite(table[table.metric.isin(METRICS)].value).all()
    vae = json.loads((finished_text.path / "data/pipelines/emoji/vae/config.json").read_text())
    assert 0 < vae["scaling_factor"] < 10


def test_nothing_is_left_to_do(finished_text: Workspace) -> None:
    assert finished_text.planned(*TABLES) == {}


def test_other_prompts_outdate_what_was_trained_or_drawn_on_them(finished_text: Workspace) -> None:
    captions = finished_text.path / "data/raw/captions.txt"
    captions.write_text(captions.read_text() + "\nanother")
    planned = finished_text.planned("sdxl-tiny-table4")
    assert (
        planned["evaluate"] == 4 and planned["prompts"] == 1 and "train" not in planned and "real_part" not in planned
    )
