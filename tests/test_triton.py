"""What torch.compile makes of train.py's step for an A100 and an H100, seen without a GPU.

    ./run_all.sh test -m slow tests/test_triton.py          # a minute for each case

The step is traced on the CPU: PyTorch runs no backward pass on a GPU that is not there. Its graphs
are then moved to a GPU that is only described; TorchInductor generates its code, and Triton and
ptxas compile that. Nothing is run. What is not seen: tensors that a step would leave on the CPU
(test_modes.py looks for those), and what a GPU decides by timing, such as the size of blocks.
"""

import importlib.util
import json
import os
import re
import sys
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import train
from kit import fast
from kit.training_speed import random_images
from models import build_model

import pytest
import torch
import torch.nn as nn
from conftest import REPO, script, settings_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

MODELS = ("baseline", "cbam_blocks")
GPUS = {"sm_80": 108, "sm_90": 132}  # so many multiprocessors: A100, H100
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)

missing = torch.version.cuda is None or importlib.util.find_spec("triton") is None
why = "needs PyTorch's CUDA build, and the Triton that comes with it; not a GPU"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing, reason=why)]

# --- A process of its own: what it changes in PyTorch stays changed -------------------------------


class Done(Exception):
    """All code is generated: there is nothing to run."""


def pretend(gpu: str) -> None:
    """To TorchInductor and Triton there is such a GPU, and the CPU's tensors are traced as its."""
    import triton
    from torch._decomp import decompositions
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    capability = int(gpu.removeprefix("sm_"))
    properties = SimpleNamespace(
        name=gpu, major=capability // 10, minor=0, multi_processor_count=GPUS[gpu], warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
    )  # fmt: skip
    for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
        owner.get_device_properties = staticmethod(lambda device=None: properties)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.is_bf16_supported = staticmethod(lambda including_emulation=True: True)
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    triton_helpers.set_driver_to_gpu = lambda: None
    # PyTorch would ask the GPU whether its cuDNN takes bf16.
    torch._C._select_conv_backend = lambda *args, **kwargs: torch._C._ConvBackend.Cudnn
    batch_norm = decompositions.native_batch_norm_helper

    def batch_norm_of_a_gpu(input, *args):  # a CPU's rounds the statistics that it saves to bf16
        out, *statistics = batch_norm(input.float(), *args)
        return out.to(input.dtype), *statistics

    decompositions.native_batch_norm_helper = batch_norm_of_a_gpu


def generate(model: str, precision: str, gpu: str, folder: str) -> None:
    """Leaves forward.py and backward.py in the folder, and the kernels in Triton's cache."""
    from torch._guards import detect_fake_mode
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    cuda = torch.device("cuda", 0)

    def compile_kernel(self, name, source, device_str="cuda"):
        kernel = getattr(PyCodeCache.load(source), name)
        if kernel.configs:  # None: compiled, for a kernel is asked for twice
            kernel.configs = kernel.configs[:1]  # of up to six sizes of blocks
            kernel.precompile(warm_cache_only=True)
        return kernel

    def compile_graph(graph, inputs, **options):  # in place of TorchInductor's last stage
        for node in graph.graph.nodes:
            arguments = (node.args, node.kwargs)
            node.args, node.kwargs = tree_map_only(torch.device, lambda _: cuda, arguments)
        with detect_fake_mode(inputs) as mode:
            inputs = [tensor.to(cuda) for tensor in inputs]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        name = "backward" if options.get("is_backward") else "forward"
        GraphLowering.save_output_code = Path(folder, f"{name}.py").write_text
        compile_fx_inner(graph, inputs, **options)

        def run(*args):
            raise Done

        return run

    pretend(gpu)
    AsyncCompile.triton = compile_kernel
    torch._functorch.config.force_non_lazy_backward_lowering = True  # before the forward pass runs
    torch._functorch.config.enable_autograd_cache = torch._inductor.config.fx_graph_cache = False
    flags = ["--model", model, "--precision", precision, "--device", "cpu", "--dry-run"]
    loader, *_, forward, _ = train.prepare(settings_of(*flags), random_images(128))
    backend = partial(compile_fx, inner_compile=compile_graph)
    with suppress(Done):
        fast.compiled(forward, torch.device("cpu"), fullgraph=True, backend=backend)(
            *loader.epoch(1)[0]
        )


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=product(MODELS, ("bf16", "fp32"), GPUS), ids="-".join)
def code(request):
    """The code of a step: forward, backward, its kernels, and what Triton made of them."""
    with TemporaryDirectory() as folder:
        variables = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        variables |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
        result = script(__file__, *request.param, folder, env=os.environ | variables)
        assert result.returncode == 0, result.stderr
        passes = [Path(folder, name).read_text() for name in ("forward.py", "backward.py")]
        model, precision, gpu = request.param
        return SimpleNamespace(
            model=model, precision=precision, gpu=gpu, forward=passes[0], backward=passes[1],
            kernels=KERNEL.findall("".join(passes)),
            compiled=[read_compiled(path) for path in Path(folder).rglob("*.ptx")],
        )  # fmt: skip


def read_compiled(path):
    """A kernel in Triton's cache: (name, its GPU, whether products and sums may be fused)."""
    assert path.with_suffix(".cubin").stat().st_size
    gpu, name = re.search(r"\.target (sm_\d+).*\.entry (\w+)\(", path.read_text(), re.S).groups()
    return name, gpu, json.loads(path.with_suffix(".json").read_text())["enable_fp_fusion"]


def test_every_kernel_compiles_for_its_gpu(code):
    names, gpus, _ = zip(*code.compiled)
    assert set(names) == {name for name, _ in code.kernels} and set(gpus) == {code.gpu}
    assert {name.split("_")[1] for name in names} == {"poi", "red", "per"}  # two: reductions


def test_convolutions_are_cudnns_and_nothing_changes_their_layout(code):
    n = sum(isinstance(module, nn.Conv2d) for module in build_model(code.model).modules())
    assert code.forward.count("= extern_kernels.convolution(") == n
    assert code.backward.count("= torch.ops.aten.convolution_backward.default(") == n
    # Such a kernel would only copy what a convolution is to read, or has written.
    copy = re.compile(r"triton_poi_fused(_convolution(_backward)?)?_\d+")
    assert not [name for name, _ in code.kernels if copy.fullmatch(name)]


def test_the_host_launches_kernels_and_never_waits(code):
    for text in (code.forward, code.backward):
        calls = text[text.index("    def call(self, args):") :]
        assert calls.count(".run(") > 50
        assert not re.search(r"\.item\(|_local_scalar_dense|synchronize|cpu|\.copy_\(", calls)


def test_values_are_rounded_as_in_eager_mode(code):
    """The gradient of a maximum goes to the values that equal it, some of them computed once more:
    they do only if rounded to bf16 likewise, and if no product enters a sum unrounded."""
    assert not any(fused for _, _, fused in code.compiled)
    for text in (code.forward, code.backward):
        assert ("*bf16" in text) == (code.precision == "bf16")
    if (code.model, code.precision) == ("cbam_blocks", "bf16"):
        compared = 0
        for name, source in KERNEL.findall(code.backward):
            line = dict(re.findall(r"(tmp\d+) = (.*)", source))
            for pair in re.findall(r"= (tmp\d+) == (tmp\d+)\n", source):
                compared += 1
                for value in pair if "nll_loss_backward" not in name else ():  # not of labels
                    cast = re.fullmatch(r"(tmp\d+)\.to\(tl\.float32\)", line[value])
                    assert cast and line[cast[1]].endswith(".to(tl.bfloat16)")
        assert compared > 2 * 8  # two maxima in each block


@pytest.mark.parametrize("model", MODELS)
def test_autocast_is_the_same_on_a_cpu_and_on_a_gpu(model, monkeypatch):
    """So these models may be traced on a CPU. Others may not: on a GPU alone softmax, powers and
    interpolation stay in float32."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    types = []
    for device in map(torch.device, ("cpu", "cuda")):
        with FakeTensorMode(), device, fast.autocast("bf16", device):
            nodes = make_fx(build_model(model))(torch.zeros(64, 1, 28, 28)).graph.nodes
        tensors = [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        # Not among them: the statistics of BatchNorm, for which see pretend().
        types.append([(n.name, n.meta["val"].dtype) for n in tensors if "getitem" not in n.name])
    assert types[0] == types[1] and torch.bfloat16 in dict(types[0]).values()


if __name__ == "__main__":
    generate(*sys.argv[1:])
