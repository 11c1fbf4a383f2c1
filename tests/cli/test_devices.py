"""Where libtpu is installed without a TPU, JAX is kept from loading it; anywhere else it is left alone."""

import importlib.machinery
import importlib.util
import os
import sys

import jax
import pytest

from kangaroo_jax.cli import devices


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """libtpu installed, no variable about platforms, and /dev without devices."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    for name in list(os.environ):
        if name.startswith(("TPU_", "JAX_PLATFORMS", "JAX_FORCE")):
            monkeypatch.delenv(name)
    (tmp_path / "null").touch()
    return tmp_path


def test_libtpu_without_a_tpu_is_found(machine):
    assert devices._tpu_is_missing({"HOME": "/", "TPU_SKIP_MDS_QUERY": "1"}, machine)


@pytest.mark.parametrize("device", ["accel0", "vfio/0", "nvidia0", "dxg", "kfd"])
def test_where_there_is_an_accelerator_jax_chooses(machine, device):
    (machine / device).parent.mkdir(exist_ok=True)
    (machine / device).touch()
    assert not devices._tpu_is_missing({}, machine)


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "JAX_FORCE_TPU_INIT"])
def test_what_the_user_says_of_devices_holds(machine, name):
    assert not devices._tpu_is_missing({name: "tpu"}, machine)


def test_without_libtpu_jax_chooses(machine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not devices._tpu_is_missing({}, machine)


def test_jax_is_told_whether_or_not_it_is_imported(machine, monkeypatch):
    monkeypatch.setattr(devices, "_tpu_is_missing", lambda environment, folder: True)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    told = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: told.append(setting))
    devices.skip_missing_tpu()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert told == [("jax_platforms", "cpu")]
    monkeypatch.delitem(sys.modules, "jax")
    devices.skip_missing_tpu()
    assert len(told) == 1
