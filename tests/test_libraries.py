"""What a provider needs on this machine, found before ONNX Runtime hides it; faults are named."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from onnxpress import errors
from onnxpress.runtime import (
    Session,
    doctor,
    gpu,
    libraries,
    opening,
    providers,
    shared_objects,
    wheels,
)

from . import onnx_models

linux = pytest.mark.skipif(sys.platform != "linux", reason="ELF files are looked into on Linux")
CUDA = ["libcublas.so.13", "libcurand.so.10", "libcudart.so.13", "libcuda.so.1", "libc.so.6"]
TENSORRT = ["libcudart.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10", "libcudnn.so.9"]


class Machine:
    """What the finder sees: which sonames load, and which files lie in the folders."""

    def __init__(self, monkeypatch, folder: Path) -> None:
        self.here, self.folder, self.driver, self.gpus = set(), folder, 13000, 1
        for module in (libraries, gpu, shared_objects):
            if hasattr(module, "load"):
                monkeypatch.setattr(module, "load", self.load)
        monkeypatch.setattr(libraries, "path_of", lambda soname: f"/lib/{soname}")
        monkeypatch.setattr(libraries, "driver_version", lambda cuda: self.driver)
        monkeypatch.setattr(libraries, "devices", lambda cuda: (self.gpus, ""))
        monkeypatch.setattr(libraries, "_VERSIONS", {"libcudart": lambda handle: "13.0"})
        monkeypatch.setattr(doctor, "gpu", lambda: None)
        monkeypatch.setattr(libraries, "kernel_driver", lambda: "570.1.2")
        monkeypatch.setattr(shared_objects, "_system_folders", lambda: [folder])
        monkeypatch.setattr(shared_objects, "_wheel_folders", list)
        self.needed: list[str] = []
        monkeypatch.setattr(libraries, "needed", lambda library: self.needed)
        monkeypatch.setattr(libraries.sys, "platform", "linux")

    def load(self, soname):
        return object() if soname in self.here else "is not on this machine"

    def library(self, name: str, needed: list[str]) -> Path:
        self.needed = needed
        path = self.folder / f"libonnxruntime_providers_{name}.so"
        path.touch()
        return path

    def refuses(self, name: str, needed: list[str], **options: str) -> str:
        with pytest.raises(errors.ProviderError) as e:
            libraries.check(name, self.library(name, needed), **options)
        assert e.value.exit_code == 4
        return str(e.value)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    return Machine(monkeypatch, tmp_path)


# What is missing, and what is there in its place


def test_all_is_there(machine):
    machine.here = {*CUDA, *TENSORRT}
    libraries.check("cuda", machine.library("cuda", CUDA), cudnn_for="Conv")
    libraries.check("tensorrt", machine.library("tensorrt", TENSORRT))
    libraries.check("openvino", machine.library("openvino", ["libopenvino.so.2541"]))


def test_no_driver(machine):
    machine.here = {*CUDA} - {"libcuda.so.1"}
    said = machine.refuses("cuda", CUDA)
    assert "no NVIDIA driver: libcuda.so.1 is not on this machine" in said
    assert "580 or newer" in said
    assert "pip install" not in said  # nothing that pip could do


def test_a_driver_too_old(machine):
    machine.here, machine.driver = {*CUDA}, 12080
    said = machine.refuses("cuda", CUDA)
    assert "the driver 570.1.2 is too old: it goes up to CUDA 12.8" in said
    assert "CUDA 13.0 is needed (driver 580 or newer)" in said


def test_no_gpu_is_visible(machine, monkeypatch):
    machine.here, machine.gpus = {*CUDA}, 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = machine.refuses("cuda", CUDA)
    assert "no GPU is visible (CUDA_VISIBLE_DEVICES='')" in said
    assert "unset CUDA_VISIBLE_DEVICES" in said
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "nvidia-smi" in machine.refuses("cuda", CUDA)


def test_cuda_12_libraries(machine, tmp_path):
    machine.here = {"libcuda.so.1"}
    for name in ("libcudart.so.12", "libcudart.so.11.0", "libcublas.so.12", "libcudart.so"):
        (tmp_path / name).touch()
    said = machine.refuses("cuda", CUDA)
    assert f"CUDA 12 runtime is here ({tmp_path / 'libcudart.so.12'})" in said
    assert "linked with CUDA 13 runtime (libcudart.so.13)" in said
    assert "cuBLAS 12 is here" in said
    assert "no cuRAND 10: libcurand.so.10 is not on this machine" in said
    assert (
        "pip install 'nvidia-cublas>=13,<14' 'nvidia-curand>=10,<11' "
        "'nvidia-cuda-runtime>=13,<14'" in said
    )


def test_tensorrt_11_in_place_of_10(machine, tmp_path):
    machine.here = {*CUDA, "libcudnn.so.9"}
    (tmp_path / "libnvinfer.so.11").touch()
    said = machine.refuses("tensorrt", TENSORRT)
    assert f"TensorRT 11 is here ({tmp_path / 'libnvinfer.so.11'})" in said
    assert "linked with TensorRT 10 (libnvinfer.so.10)" in said
    assert "pip uninstall -y tensorrt tensorrt-cu13" in said
    assert "'tensorrt-cu13>=10.15,<11'" in said


def test_cudnn_missing_or_another(machine, tmp_path):
    machine.here = {*CUDA}
    library = machine.library("cuda", CUDA)
    libraries.check("cuda", library)  # it is loaded when a node needs it
    said = machine.refuses("cuda", CUDA, cudnn_for="Conv")
    assert "no cuDNN 9: libcudnn.so.9 is not on this machine, and Conv needs it" in said
    assert "pip install 'nvidia-cudnn-cu13>=9,<10'" in said
    (tmp_path / "libcudnn.so.8").touch()
    assert "cuDNN 8 is here" in machine.refuses("cuda", CUDA, cudnn_for="Conv")
    machine.here |= {"libnvinfer.so.10", "libnvonnxparser.so.10"}
    assert "cuDNN 8 is here" in machine.refuses("tensorrt", TENSORRT)  # linked, not loaded late


def test_a_wheel_without_the_library_that_it_lists(tmp_path):
    with pytest.raises(errors.ProviderError, match="is not in the onnxruntime package"):
        libraries.check("cuda", tmp_path / "libonnxruntime_providers_cuda.so")


def test_other_systems_are_not_looked_into(monkeypatch, tmp_path):
    monkeypatch.setattr(libraries.sys, "platform", "win32")
    assert libraries.examine(tmp_path / "libonnxruntime_providers_cuda.so") == []


def test_the_operator_that_needs_cudnn(tmp_path):
    model = onnx_models.add_model()
    session = Session(onnx_models.publish(tmp_path / "a", model))
    assert session._model.needs_cudnn({}) == ""
    assert "com.microsoft::MultiHeadAttention" in opening._CUDNN_OPS


# Real files


@linux
def test_needed_of_real_and_of_other_files(tmp_path):
    core = next(Path(providers.onnxruntime().__file__).parent.glob("capi/*pybind11_state*.so"))
    found = shared_objects.needed(core)
    assert "libc.so.6" in found
    assert all(".so" in name for name in found)
    whole = core.read_bytes()
    for data in (b"", b"not a library", whole[:70], whole[:1000], struct.pack("<Q", 1) * 9):
        (tmp_path / "x.so").write_bytes(data or b" ")
        assert shared_objects.needed(tmp_path / "x.so") == []


@linux
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc makes the stand-in libraries")
def test_planted_libraries(tmp_path):
    """In a process of its own: CUDA 12, TensorRT 11 and cuDNN 8 here, a part that lacks a part."""

    def make(soname: str, code: str = "", *needs: Path) -> Path:
        (tmp_path / "a.c").write_text(code)
        made = tmp_path / soname
        options = ["-shared", "-fPIC", "-Wl,--no-as-needed", f"-Wl,-soname,{soname}"]
        source = str(tmp_path / "a.c")
        subprocess.run(["gcc", *options, source, *map(str, needs), "-o", str(made)], check=True)
        return made

    linked = [make(s) for s in ("libcublas.so.13", "libnvinfer.so.10", "libcudart.so.13")]
    provider = make("libonnxruntime_providers_cuda.so", "", *linked)
    for one in linked:
        one.unlink()
    make("libcuda.so.1", "int cuDriverGetVersion(int *v) { *v = 13010; return 0; }")
    lost = make("liblost.so.1")
    make("libcublas.so.13", "", lost)
    lost.unlink()
    make("libnvinfer.so.11")
    make("libcudart.so.13", "int cudaRuntimeGetVersion(int *v) { *v = 13020; return 0; }"
         "int cudaGetDeviceCount(int *n) { *n = 1; return 0; }")  # fmt: skip
    wheel = tmp_path / "site" / "nvidia" / "cudnn" / "lib"  # where no loader looks
    wheel.mkdir(parents=True)
    make("libcudnn.so.9", "unsigned long cudnnGetVersion(void) { return 91002; }").rename(
        wheel / "libcudnn.so.9"
    )
    code = """
import json, sys; from pathlib import Path
from onnxpress.runtime import libraries
print(json.dumps([[o.soname, o.version, o.problem, o.path] for o in
                  libraries.examine(Path(sys.argv[1]))]))"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(provider)],
        env={"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(tmp_path / "site")},
        check=True, capture_output=True,
    )  # fmt: skip
    found = {soname: rest for soname, *rest in json.loads(done.stdout)}
    assert found["libcuda.so.1"][0].endswith("CUDA 13.1")
    assert found["libcuda.so.1"][1] == ""
    assert found["libcublas.so.13"][1] == "no cuBLAS 13: libcublas.so.13 needs liblost.so.1, " \
        "which is not here"  # fmt: skip
    assert f"TensorRT 11 is here ({tmp_path / 'libnvinfer.so.11'})" in found["libnvinfer.so.10"][1]
    assert found["libcudart.so.13"] == ["13.2", "", str(tmp_path / "libcudart.so.13")]
    assert found["libcudnn.so.9"] == ["9.10.2", "", str(wheel / "libcudnn.so.9")]


# Wheels


def plant(site: Path, name: str, version: str, *, folder: Path | None = None) -> None:
    """A distribution as pip leaves it, in a site of its own or over another's files."""
    about = site / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "RECORD").write_text("onnxruntime/__init__.py,,\n")
    (site / "onnxruntime").mkdir(exist_ok=True)
    (site / "onnxruntime" / "__init__.py").touch()


def test_two_wheels_in_one_folder(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    plant(one, "onnxruntime", "1.32.0")
    plant(other, "onnxruntime-gpu", "1.31.1")
    monkeypatch.setattr(sys, "path", [str(other), str(one)])
    assert [str(w) for w in wheels.wheels()] == ["onnxruntime-gpu 1.31.1", "onnxruntime 1.32.0"]
    assert wheels.duplicates() == []  # one hides the other, and nothing is broken
    assert str(wheels.wheel_of(one / "onnxruntime")) == "onnxruntime 1.32.0"
    wheels.check_wheels()
    assert doctor._onnxruntime().works
    plant(one, "onnxruntime-gpu", "1.31.1")
    with pytest.raises(errors.ProviderError, match="installed in one folder") as e:
        wheels.check_wheels()
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1" in str(e.value)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu; " in e.value.hint
    assert e.value.hint.endswith("pip install 'onnxruntime-gpu==1.31.1'")
    told = doctor._onnxruntime()
    assert not told.works
    assert told.fix == e.value.hint


def test_a_session_on_a_gpu_refuses_two_wheels(tmp_path, monkeypatch):
    path = onnx_models.publish(tmp_path / "a", onnx_models.add_model())
    wheel = [wheels.Wheel(n, "1.32.0", tmp_path) for n in ("onnxruntime", "onnxruntime-gpu")]
    monkeypatch.setattr(wheels, "wheels", lambda: wheel)
    with pytest.raises(errors.ProviderError, match="overwritten each other"):
        Session(path, provider="cuda")
    assert Session(path).provider == "cpu"


@pytest.mark.parametrize(
    ("name", "version", "works"),
    [
        ("onnxruntime", "1.32.0", True),
        ("onnxruntime", "1.24.1", False),
        ("onnxruntime-gpu", "1.33.0", False),
        ("onnxruntime-openvino", "1.24.1", True),  # it has releases of its own
        ("onnxruntime-openvino", "1.32.0", False),
    ],
)
def test_each_wheel_has_its_own_range(tmp_path, monkeypatch, name, version, works):
    plant(tmp_path, name, version)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    told = doctor._onnxruntime()
    assert told.works == works
    assert works or told.fix.startswith(f"pip install '{name}>=")


def test_no_wheel_at_all(monkeypatch):
    monkeypatch.setattr(doctor, "wheels", list)
    told = doctor._onnxruntime()
    assert (told.works, told.detail) == (False, "not installed")
    assert told.fix.startswith("pip install 'onnxruntime")


# Doctor


def test_doctor_is_calm_without_a_gpu(machine, monkeypatch, tmp_path):
    machine.here, library = {"libcudart.so.13"}, machine.library("cuda", CUDA)
    rt = providers.onnxruntime()
    here = {**providers.PROVIDERS}
    here["cuda"] = providers.Provider(here["cuda"].ort, here["cuda"].hint, str(library))
    monkeypatch.setattr(doctor, "PROVIDERS", here)
    monkeypatch.setattr(rt, "get_available_providers", lambda: [here["cuda"].ort, here["cpu"].ort])
    found = {c.name: c for c in doctor.examine()}
    assert found["provider cpu"].works
    assert found["CUDA 13 runtime"].works
    assert not found["NVIDIA driver"].works
    assert found["NVIDIA driver"].detail == "libcuda.so.1 is not on this machine"
    assert found["cuBLAS 13"].fix == "pip install 'nvidia-cublas>=13,<14'"
    assert "GPU" not in found
    for check in found.values():
        assert check.works or check.fix
