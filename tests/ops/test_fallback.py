"""What becomes of an operator whose CUDA kernels cannot run, by errors the host answers with."""

import threading
import warnings

import pytest
import torch
from problems import DAMPING, gradients, gram_of, relative_error

from obert_kernels import GramFisher, ops, prune
from obert_kernels.ops import fallback, native

# Errors of the CUDA runtime and a word of the remedy.
NO_KERNELS = {
    35: "update the driver",  # cudaErrorInsufficientDriver
    36: "update the driver",  # cudaErrorCallRequiresNewerDriver
    98: "OBERT_CUDA_ARCHS",  # cudaErrorInvalidDeviceFunction
    200: "OBERT_CUDA_ARCHS",  # cudaErrorInvalidKernelImage
    209: "OBERT_CUDA_ARCHS",  # cudaErrorNoKernelImageForDevice
    218: "OBERT_CUDA_ARCHS",  # cudaErrorInvalidPtx
    221: "libnvidia-ptxjitcompiler",  # cudaErrorJitCompilerNotFound
    222: "update the driver",  # cudaErrorUnsupportedPtxVersion
    223: "CUDA_DISABLE_PTX_JIT",  # cudaErrorJitCompilationDisabled
    803: "restart the machine",  # cudaErrorSystemDriverMismatch
    804: "update the driver",  # cudaErrorCompatNotSupportedOnDevice
}
ILLEGAL_ADDRESS = 700
N, BLOCK = 110, 50


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(fallback, "_without_kernels", set())
    monkeypatch.setattr(fallback, "_said", set())


@pytest.fixture
def refusing(cuda_on_host):
    """The host, which answers launches with an error that is set."""
    yield cuda_on_host
    cuda_on_host.set_launch_error(0)


def call_every_operator():
    """Results of all operators on the same problem, changed arguments included."""
    torch.manual_seed(0)
    g = gradients(40, N)
    gram, weight, status = gram_of(g, BLOCK), torch.randn(N), ops.new_status()
    keep, fisher = torch.rand(N) < 0.5, (BLOCK, 40.0, DAMPING)
    start, first = torch.tensor([0, 3]), torch.tensor([0, 2, 5])
    living, places = torch.zeros(9, dtype=torch.float64), torch.tensor([4, 7, 50, 60, 109]).int()
    inverse = ops.gram_inverse(gram, N, *fisher, torch.float32, status)
    found = [
        inverse.clone(),
        ops.gram_accumulate(gram, g, BLOCK),
        ops.gram_accumulate_living(living, g, start, first, places),
        ops.woodbury_update(inverse, g, 40.0, status),
        ops.gram_diagonal(gram, N, *fisher, torch.float64, status),
        ops.gram_solve(gram, weight, *fisher, status),
        ops.gram_scores(gram, weight, 1, *fisher, status),
        ops.gram_greedy_scores(gram, weight, keep, 1, *fisher, status),
        ops.gram_n_of_m(gram, weight, keep, 1, 2, *fisher, status).float(),
        *ops.gram_update(gram, weight, keep, 1, True, *fisher, status),
        ops.inverse_scores(inverse, weight, 1, status),
        *ops.inverse_update(inverse, weight, keep, 1, False, True, status),
    ]
    return [*(tensor for tensor in found if tensor is not None), gram, living, inverse, status]


@pytest.mark.parametrize("error", NO_KERNELS)
def test_operators_go_on_in_torch_with_one_warning(refusing, error):
    expected = call_every_operator()
    refusing.reset_counters()
    refusing.set_launch_error(error)
    with pytest.warns(fallback.SlowOperatorsWarning) as said:
        found = call_every_operator()
    assert len(said) == 1
    text = str(said[0].message)
    assert NO_KERNELS[error] in text and "plain torch" in text and "\n" not in text
    assert refusing.counters()["load_bytes"] == 0, "a kernel ran"
    assert len(found) == len(expected) == 15
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs.double()) < 1e-4
    # What the driver said once is not asked again.
    refusing.set_launch_error(0)
    call_every_operator()
    assert refusing.counters()["load_bytes"] == 0


def test_a_model_is_pruned_all_the_same(refusing):
    def pruned():
        torch.manual_seed(0)
        model = torch.nn.Linear(20, 10)
        batches = [torch.randn(2, 20) for _ in range(8)]
        return prune(
            model, batches, 0.5, params="weight", num_grads=8, damping=1e-4,
            loss_fn=lambda m, b: m(b).square().mean(),
        ).model.weight  # fmt: skip

    expected = pruned()
    refusing.set_launch_error(209)
    with pytest.warns(fallback.SlowOperatorsWarning) as said:
        found = pruned()
    assert len(said) == 1
    torch.testing.assert_close(found, expected)


def test_a_warning_that_is_an_error_leaves_everything_as_it_was(refusing):
    """So nobody times or tests torch in place of a kernel."""
    g = gradients(3, N)
    fisher = GramFisher(N, BLOCK)
    refusing.set_launch_error(209)
    for _ in range(2):
        with warnings.catch_warnings(), pytest.raises(fallback.SlowOperatorsWarning):
            warnings.simplefilter("error")
            fisher.accumulate(g)
    assert not fisher.gram.any() and fisher.num_gradients == 0


def test_any_other_error_of_a_launch_may_be_an_earlier_one(refusing):
    refusing.set_launch_error(ILLEGAL_ADDRESS)
    expected = r"illegal memory access .*earlier.*CUDA_LAUNCH_BLOCKING=1"
    with pytest.raises(RuntimeError, match=expected):
        call_every_operator()
    refusing.set_launch_error(0)
    call_every_operator()  # nothing is left of it
    assert refusing.counters()["load_bytes"] > 0


def test_a_device_is_asked_once_for_what_it_has(cuda_on_host):
    """By any number of threads, and every device for itself."""
    before = cuda_on_host.attribute_queries()
    threads = [threading.Thread(target=call_every_operator) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    call_every_operator()
    assert cuda_on_host.attribute_queries() - before <= 4
    middle = cuda_on_host.attribute_queries()
    call_every_operator()
    assert cuda_on_host.attribute_queries() == middle
    try:
        for limit in (40_000, 30_000, 40_000):
            cuda_on_host.set_shared_memory_limit(limit)
            call_every_operator()
            with pytest.raises(ValueError, match=f"this device has {limit} for a thread block"):
                GramFisher(256, 256).inverse(1.0)
        assert cuda_on_host.attribute_queries() == middle + 2
    finally:
        cuda_on_host.set_shared_memory_limit(231424)


@pytest.mark.parametrize(
    ("failure", "hip", "expected"),
    [
        (None, None, "this build has none: with nvcc installed"),
        ("the native core could not be loaded", None, "could not be loaded"),
        (None, "6.0", "torch for ROCm"),
    ],
)
def test_a_build_without_kernels_says_so_once(monkeypatch, failure, hip, expected):
    monkeypatch.setattr(native, "_failure", failure)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.warns(fallback.SlowOperatorsWarning, match=expected) as said:
        for index in (0, 1, 0):
            fallback.warn_if_slower(torch.device("cuda", index))
    assert len(said) == 1
    assert "cuda:0 (Some GPU, compute capability 9.0)" in str(said[0].message)


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_other_devices_have_no_kernels_to_miss(device):
    fallback.warn_if_slower(torch.device(device))
