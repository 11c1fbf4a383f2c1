"""--preflight: its table against sizes known beforehand, both verdicts, and what is wrong with the flag."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest

from kangaroo_jax import DraftConfig, TreeConfig
from kangaroo_jax.cli.preflight_flag import show
from kangaroo_jax.errors import InputError, MachineError
from kangaroo_jax.model import sharding
from kangaroo_jax.preflight import machines
from kangaroo_jax.preflight.decoding import decoding
from kangaroo_jax.preflight.machines import Limits, Machine, find_machine
from kangaroo_jax.preflight.report import Program
from kangaroo_jax.preflight.training import training
from kangaroo_jax.train import step
from tests.train.runs import configured

ROOT = pathlib.Path(__file__).parents[1]
TARGET = ROOT / "tests" / "fixtures" / "golden" / "tiny-gqa"
SMALL = {"target": str(TARGET), "batch_size": 2, "sequence_length": 32, "loss_chunk": 16, "data.files": "none/*.txt"}


def command(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_prints_the_training_steps_table_and_says_that_it_fits():
    overrides = [f"--config.{name}={value}" for name, value in SMALL.items()]
    done = command("train.py", "--config=configs/demo.py", "--preflight=local", *overrides)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^  (.+?), (?:per device|all devices)  +(\S+) ", done.stdout, re.MULTILINE))
    assert set(found) == {"arguments", "temporary", "peak", "matrix products"}
    assert "mesh data 1, fsdp 1, model 1" in done.stdout
    # The target's matrices once forward, the adapter's three times, both heads and the draft's gradient once more.
    layer, adapter, head = 128 * (128 * 2 + 64 * 2 + 3 * 352), 128 * (128 * 2 + 64 * 2), 128 * 259
    tokens = 2 * 32
    assert float(found["matrix products"]) >= 2 * tokens * (8 * layer + 3 * adapter + 3 * head)
    assert float(found["matrix products"]) < 2 * tokens * (8 * layer + 3 * adapter + 5 * head) * 1.3
    assert re.search(r"^fits: \d\.\d\d GiB of ", done.stdout, re.MULTILINE)


def test_what_does_not_fit_is_said_so_and_a_cached_teachers_pass_has_its_table(capsys):
    report = training(configured(SMALL, teacher="cached"), Machine("here", jax.devices(), memory=1000))
    assert report.fits is False
    assert show(report) is False
    out = capsys.readouterr().out
    assert "does not fit: 0.0" in out
    step, teacher = (float(x) for x in re.findall(r"matrix products, all devices +(\S+) FLOPs", out))
    assert [step, teacher] == [pytest.approx(program.operations, rel=1e-2) for program in report.programs]
    assert step < teacher  # 2 of 8 layers, and three times the adapter and the head, against 8 layers


@pytest.mark.long
def test_a_round_of_decoding_has_its_table_and_a_trees_costs_its_budget(capsys):
    def products(draft, limits=None):
        here = Machine("here", jax.devices(), 2**30, limits)
        assert show(decoding(str(TARGET), "float32", draft, 64, 32, 1, here)) is True
        out = capsys.readouterr().out
        assert out.index("\nprefill\n") < out.index("\nrounds ") < out.index("\nfits: ")
        assert out.count("peak, per device") == 2
        assert str(draft) in out
        outputs.append(out)
        return [float(x) for x in re.findall(r"matrix products, all devices +(\S+) FLOPs", out)]

    outputs = []
    prefill, single = products(DraftConfig(2, 2))
    same, tree = products(DraftConfig(2, 2, tree=TreeConfig(2, 6)), Limits(1e9, {"float32": 1e12}))
    assert same == prefill
    assert tree > 1.5 * single  # 7 positions verified, not 3
    assert "predicted" not in outputs[0]  # how fast this machine is has to be measured
    assert "\npredicted, not measured, of each device at 1 GB/s and 1 TFLOP/s\n" in outputs[1]
    layer = 128 * (128 * 2 + 64 * 2 + 3 * 352) + 2 * 128 + 2 * 128 * 64
    read = 4 * (8 * layer + 259 * 128)  # weights and caches of 128 positions
    assert re.search(rf"^plain step +{read / 1e9:.3f} .* {read / 1e6:.3f} +1\.000$", outputs[1], re.MULTILINE)
    assert f"\nplain decoding: {1e9 / read:,.0f} tokens per second\n" in outputs[1]
    assert re.search(r"^level of 2 tokens .*\n(.*\n)+verification of 7 ", outputs[1], re.MULTILINE)
    assert outputs[1].count("\n2 drafts in each round ") == 1


class NoRoom:
    """A step that XLA for TPU finds no room for, in its words."""

    trace = lower = lambda self, *inputs: self
    jaxpr = types.SimpleNamespace(jaxpr=types.SimpleNamespace(eqns=[]))

    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.51G) "
            "exceeds available HBM (15.75G).\nmore lines"
        )


def test_a_program_that_the_compiler_finds_no_room_for_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(step, "compiled", lambda *_: (NoRoom(), None))
    assert show(training(configured(SMALL), Machine("here", jax.devices(), memory=2**30))) is False
    out = capsys.readouterr().out
    assert "no room: Ran out of memory on HBM" in out
    assert "21.51G" in out
    assert out.endswith("\ndoes not fit\n")


def test_a_kernel_without_room_of_its_own_is_no_want_of_the_device_s_memory(monkeypatch):
    class Kernel(NoRoom):
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.1M")

    monkeypatch.setattr(step, "compiled", lambda *_: (Kernel(), None))
    with pytest.raises(MachineError, match=r"training step could not be compiled \(RESOURCE_EXHAUSTED: .* vmem"):
        training(configured(SMALL), Machine("here", jax.devices(), memory=2**30))


def test_weights_that_each_device_holds_all_of_are_named(monkeypatch):
    monkeypatch.setattr(sharding, "undivided", lambda shapes, mesh: [f"{name} is not split" for name in shapes])
    monkeypatch.setattr(
        "kangaroo_jax.preflight.decoding.Work.prefill", lambda _: Program("", 0, 0, 0, 0, 0, *[None] * 4)
    )
    report = decoding(str(TARGET), "float32", DraftConfig(2, 2), 64, 32, 1, Machine("here", jax.devices(), None))
    assert "layers.0.mlp.gate_up_proj is not split" in report.notes


def test_weights_and_caches_that_a_device_cannot_hold_need_no_compiler(monkeypatch, capsys):
    def report(memory):
        return decoding(str(TARGET), "float32", DraftConfig(2, 2), 64, 32, 1, Machine("here", jax.devices(), memory))

    monkeypatch.setattr("kangaroo_jax.preflight.decoding.compiled", lambda *_: pytest.fail("was compiled"))
    attention, norms, cache = 128 * (128 * 2 + 64 * 2), 2 * 128, 2 * 64 * 128
    layer, adapter = attention + 3 * 128 * 352 + norms, attention + norms
    least = 4 * (8 * layer + adapter + 9 * cache + 2 * 259 * 128 + 128)
    found = report(least)
    assert found.fits is False
    assert least < found.programs[0].arguments < 1.001 * least  # tokens, lengths and the like are more
    assert show(found) is False
    assert "\n  no room: weights and caches alone take 0.01 GiB of a device's 0.01\n" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception, match="was compiled"):
        report(1.001 * least)


@pytest.mark.parametrize("name", ["v5e", "v5e:4x", "v9:2x2", "v5e:0x4", "gpu", "h100:0", "h100:2x2", "rtx:8"])
def test_machines_that_are_none_are_named(name):
    known = r"expected local, GPUs \(h100, h200, a100-80, b200; .*\), or a TPU topology: one of v5e, v5p, v6e, tpu7x"
    with pytest.raises(InputError, match=f"preflight {name}: {known}"):
        find_machine(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "preflight"), ("h100:8", "preflight-cuda")])
def test_without_the_compiler_one_line_says_what_to_install(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=rf"pip install -e '\.\[{extra}\]'"):
        find_machine(name)


def test_gpus_are_full_hosts_or_part_of_one(monkeypatch):
    asked = []

    def topology(**settings):
        asked.append(settings["topology"])
        return types.SimpleNamespace(devices=[types.SimpleNamespace(device_kind="a GPU", platform="gpu")])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(machines.topologies, "get_topology_desc", topology)
    assert find_machine("b200").memory == 191514411008
    find_machine("h100:5")
    find_machine("h100:16")
    assert asked == ["1x1x1", "1x1x5", "1x2x8"]
    with pytest.raises(InputError, match="h100:12: expected at most 8 GPUs, or a multiple of 8"):
        find_machine("h100:12")


def test_a_compiler_that_fails_is_one_line(monkeypatch):
    class Fails(NoRoom):
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: No PTX compilation provider is available.\nmore lines")

    monkeypatch.setattr(step, "compiled", lambda *_: (Fails(), None))
    with pytest.raises(
        MachineError, match=r"preflight here: training step could not be compiled \(UNAVAILABLE: No PTX"
    ):
        training(configured(SMALL), Machine("here", jax.devices(), memory=2**30))


def test_a_prompt_longer_than_the_targets_context_is_named():
    here = Machine("here", jax.devices(), memory=2**30)
    with pytest.raises(InputError, match=r"context: 4096 tokens and 32 new ones are more than the target's \d+"):
        decoding(str(TARGET), "float32", DraftConfig(2, 2), 4096, 32, 1, here)


def test_targets_of_unknown_shape_are_named():
    config = configured(SMALL, target="no_such_shape")
    with pytest.raises(InputError, match=r"no_such_shape: no folder with config\.json.*llama7b, .*llama7b_32k"):
        training(config, Machine("here", jax.devices(), memory=1))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_topology_on_a_machine_without_tpus():
    overrides = [f"--config.{name}={value}" for name, value in (SMALL | {"dtype": "bfloat16"}).items()]
    done = command("train.py", "--config=configs/demo.py", "--preflight=v5e:2x2", "--config.mesh.fsdp=2", *overrides)
    assert (done.returncode, done.stdout) == (2, "")
    assert "whose product is exactly 4" in done.stderr
    overrides += ["--config.mesh.fsdp=2", "--config.mesh.model=2"]
    done = command("train.py", "--config=configs/demo.py", "--preflight=v5e:2x2", *overrides)
    assert done.returncode == 0, done.stderr
    assert "v5e:2x2 (4 x TPU v5 lite): mesh data 1, fsdp 2, model 2" in done.stdout
    assert re.search(r"all-gather, per device +0\.0\d GiB in \d+", done.stdout)
    assert "of 16.00 GiB" in done.stdout
    assert done.stderr == ""


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the GPU compiler is not installed")
def test_gpus_on_a_machine_without_gpus():
    flags = ["--context=64", "--max_new_tokens=32", "--exit_layer=2", "--model_parallel=2", "--batch_size=4"]
    done = command("decode.py", f"--model={TARGET}", "--preflight=h100:2", *flags)
    assert done.returncode == 0, done.stderr
    assert "h100:2 (2 x NVIDIA H100 80GB HBM3): mesh data 1, fsdp 1, model 2" in done.stdout
    assert "decoding 4 sequences" in done.stdout
    assert re.search(r"all-reduce, per device +0\.0\d GiB in \d+", done.stdout)
    assert "of 79.11 GiB" in done.stdout
    kernels = [int(x) for x in re.findall(r"^(?:plain|draft) step +\S+ +\S+ +(\d+) ", done.stdout, re.MULTILINE)]
    assert len(kernels) == 2
    assert 0 < kernels[1] < kernels[0]
    gathered = [int(x) for x in re.findall(r"all-gather, per device +\S+ GiB in (\d+)", done.stdout)]
    assert max(gathered, default=0) < 2 * 8  # caches stay where they are: 2 buffers in each of 8 layers
