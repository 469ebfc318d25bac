"""What others have published: listed with its sources, and compared with the same work alone."""

import json

import pytest
from runs import summary_of

from ftgen import catalogue
from ftgen.results.baseline import read_baseline
from ftgen.results.keys import View
from ftgen.results.options import other_work
from ftgen.show.formats import markdown

ALL_LINEAR = {"targets": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]}
# publication, conditions, and what follows from its figures as others have computed it: tokens/s/GPU
SPEEDS = [
    ("llama3_8b_recipe", {"scheme": "lora", "precision": "fp8", "gpus": 8}, 24_094),
    ("llama3_8b_recipe", {"scheme": "lora", "precision": "bf16", "gpus": 8}, 17_809),
    ("llama3_8b_recipe", {"scheme": "sft", "precision": "fp8", "gpus": 8}, 17_246),
    ("llama3_8b_recipe", {"scheme": "sft", "precision": "bf16", "gpus": 8}, 12_412),
    ("llama3_70b_recipe", {"scheme": "sft", "precision": "fp8"}, 1_812),
    ("llama3_70b_recipe", {"scheme": "sft", "precision": "bf16"}, 1_219),
    ("llama3_70b_recipe", {"scheme": "lora", "precision": "fp8", "gpus": 8}, 2_521),
    ("llama3_70b_recipe", {"scheme": "lora", "precision": "bf16", "gpus": 8}, 1_797),
]


@pytest.mark.parametrize("publication", catalogue.publications(), ids=lambda each: each.name)
def test_a_publication_names_its_source_and_every_row_has_a_figure(publication):
    assert all((publication.source, publication.date, publication.software, publication.publisher))
    assert publication.results or publication.times_to_train
    for row in publication.results:
        assert row.time_of_step_s
        assert row.speed_of_gpu
        assert row.gpu in {*catalogue.gpus(), "gb200", "gb300", "b300"}


@pytest.mark.parametrize(("name", "conditions", "speed"), SPEEDS)
def test_the_speed_of_a_gpu_follows_from_the_step_time(name, conditions, speed):
    (publication,) = [each for each in catalogue.publications() if each.name == name]
    (row,) = [row for row in publication.results if all(getattr(row, key) == value for key, value in conditions.items())]
    assert row.speed_of_gpu == pytest.approx(speed, abs=1)


@pytest.mark.parametrize("publication", catalogue.publications(), ids=lambda each: each.name)
def test_a_step_time_beside_a_speed_fits_it(publication):
    for row in publication.results:
        if row.step_time_s and row.tokens_per_s_per_gpu:
            assert row.tokens_of_gpu / row.step_time_s == pytest.approx(row.tokens_per_s_per_gpu, rel=0.002)


def test_conditions_select_rows(ftgen):
    found = json.loads(ftgen("published", "gpu=h100", "scheme=lora", "model=llama3_70b", "precision=fp8", "--json").stdout)
    assert {(row["publication"], row["gpus"]) for row in found} == {
        ("llama3_70b_recipe", 8),
        ("llama3_70b_recipe", 16),
        ("llama3_70b_recipe", 32),
        ("megatron_bridge_2606", 8),
    }


def test_the_table_marks_what_is_derived_and_names_the_source(ftgen):
    text = ftgen("published", "publication=megatron_bridge_2606", "gpu=gb300", "scheme=sft").stdout
    assert "~0.85          4819    2083" in text
    assert "source: github.com/NVIDIA-NeMo/Megatron-Bridge" in text
    assert "note: SFT of the 70B on H100 is 9.6% slower" in text


@pytest.mark.parametrize(("words", "said"), [(["gpx=h100"], "unknown key gpx"), (["h100"], "must be KEY=VALUE, found h100")])
def test_a_wrong_condition_is_named(ftgen, words, said):
    done = ftgen("published", *words)
    assert done.returncode == 2
    assert said in done.stderr


def run(experiment, time_s, batch, **known):
    return summary_of(experiment, [time_s] * 20, batch)._replace(**known)


def test_the_baseline_says_which_publication_a_figure_is_from():
    baseline = read_baseline("published")
    sources = {
        gpu: baseline.source(run("lora_nemo_llama3_70b_fp8_8", 2.64, 32, gpu=gpu)) for gpu in ("h100", "h200", "gb200")
    }
    assert sources == {
        "h100": "Llama-3 70B fine-tuning recipe",
        "h200": "Llama-3 70B fine-tuning recipe",  # the recipe's figures stand beside any GPU
        "gb200": "Megatron-Bridge performance summary, container 26.06",
    }
    sft = run("sft_nemo_llama2_7b_fp8_8", 0.957, 32, gpu="h100", published=None)
    assert baseline.ratio(sft) == pytest.approx(1.0, abs=0.001)
    assert "published: NeMo 24.07 performance summary, fine-tuning" in markdown.render(View([sft], baseline))


def test_other_work_is_not_compared_with_the_recipe():
    baseline = read_baseline("published")
    same = run("lora_nemo_llama3_8b_bf16_8", 0.92, 32)
    assert baseline.ratio(same) == pytest.approx(1.0)
    for plan in ({"data": {"packed": False}}, {"lora": ALL_LINEAR}):
        assert baseline.ratio(same._replace(options=tuple(other_work(plan)))) is None


def test_work_without_packing_is_compared_with_a_publication_of_such_work():
    options = tuple(other_work({"data": {"packed": False}, "lora": ALL_LINEAR}))
    alone = run("lora_nemo_llama3_8b_bf16_1", 5.255, 32, options=options)
    baseline = read_baseline("published")
    assert baseline.ratio(alone) == pytest.approx(0.5)
    assert baseline.source(alone) == "NeMo AutoModel performance summary, LoRA"
    assert baseline.ratio(alone._replace(gpu="h200")) is None  # figures of a publication are for its GPU
