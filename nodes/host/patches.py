"""Patches that other nodes have put on a MODEL, while this pack runs it: they act as in sampling, or are
refused by name.

Samplers call patches without gradients and at one time for a whole batch, and throw away what goes in.
Learning keeps what goes in for its backward pass, and computes parts of the forward pass twice where
memory is short. So patches get copies, and what they draw at random is the same at every call.
"""

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import torch
from comfy.ldm.modules.attention import CrossAttention, attention_pytorch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ...em_core.errors import OUT_OF_MEMORY, TrainingError, UserError
from .text import keep_saved

COMPILED = "torch.compile"
KERNEL_ERROR = 0.1
MEMORY = ("out of memory", "ALLOC_FAILED")
NODES = {True: "Learn Concepts", False: "Extract Latent Masks"}
# What torch says where a patch cannot be learned through, and what that means.
REASONS = {
    "nference tensor": "it brings tensors that have no gradient",
    "modified by an inplace operation": "it changes values in place that learning still needs",
    "no autograd formula": "it computes with a kernel that has no gradient",
    "does not require grad": "it cuts the gradient off",
}


def compiled_parts(patcher: Any) -> tuple[bool, list[str]]:
    """Return whether a node compiles the MODEL while it samples, and the parts that one has replaced."""
    wrapped = bool(patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILED))
    replaced = [name for name, part in patcher.object_patches.items() if hasattr(part, "_orig_mod")]
    return wrapped, replaced


def uncompiled(patcher: Any) -> Any:
    """Return the MODEL without torch.compile, which gives the same values and hides the attention.

    The compiled module is always the user's own, never a copy that is learned on.
    """
    wrapped, replaced = compiled_parts(patcher)
    if not wrapped and not replaced:
        return patcher
    twin = patcher.clone()
    twin.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILED)
    for name in replaced:
        twin.object_patches.pop(name)
    return twin


def patch_functions(patcher: Any) -> list[Any]:
    """Return the functions and objects that act on the MODEL's forward pass."""
    options = patcher.model_options["transformer_options"]
    found = [patch for patches in options.get("patches", {}).values() for patch in patches]
    for replaced in options.get("patches_replace", {}).values():
        found += [patch for patch in replaced.values() if patch is not None]
    for place in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        found += patcher.get_all_wrappers(place)
    found += [options.get("optimized_attention_override")]
    found += [patcher.model_options.get("model_function_wrapper")]
    found += [one for group in patcher.injections.values() for one in group]
    return [patch for patch in found if patch is not None]


def origin(patch: Any) -> str:
    """Return the title of the node that a patch seems to come from, and the pack if it is not core's."""
    patch = getattr(patch, "func", patch)
    patch = getattr(patch, "inject", patch)
    named = patch if hasattr(patch, "__qualname__") else type(patch)
    name, module = named.__qualname__.partition(".")[0], named.__module__
    if module.startswith(__package__):
        return "Apply Concept Tokens"
    _, _, pack = module.replace("\\", "/").partition("custom_nodes/")
    known = sys.modules.get("nodes")
    titles = getattr(known, "NODE_DISPLAY_NAME_MAPPINGS", {})
    for node_id, node in getattr(known, "NODE_CLASS_MAPPINGS", {}).items():
        if node.__name__ == name:
            name = titles.get(node_id) or node_id
            break
    return f"{name} ({pack.partition('.')[0]})" if pack else name


def origins(patcher: Any) -> str:
    """Return the titles of the nodes whose patches act on the MODEL; empty without any."""
    return ", ".join(dict.fromkeys(map(origin, patch_functions(patcher))))


def refusal(patcher: Any, reason: str, learning: bool) -> UserError:
    """Return the error that tells which patches a MODEL has, and where to connect this pack's node."""
    node = NODES[learning]
    return UserError(
        f"{node} cannot run the MODEL through a patch that another node has put on it: {reason}. Patches "
        f"on this MODEL: {origins(patcher) or 'of an unknown kind'}. Connect the MODEL from before such a "
        f"node to {node}; for drawing, leave the node where it is."
    )


@contextmanager
def refusing(patcher: Any, learning: bool, anything: bool = False) -> Iterator[None]:
    """Tell in words which patch is at fault where a MODEL that has patches cannot be run or learned on.

    Args:
        patcher: the MODEL.
        learning: whether the run learns, for the message.
        anything: whether every error is taken for the patches'; otherwise only those in `REASONS` are.

    Raises:
        UserError: instead of the patch's own error.
    """
    try:
        yield
    except (UserError, TrainingError, OUT_OF_MEMORY, mm.InterruptProcessingException):
        raise
    except Exception as error:
        said = str(error)
        reason = next((what for words, what in REASONS.items() if words in said), None)
        anything = anything and bool(patch_functions(patcher))
        if any(words in said for words in MEMORY) or not (reason or anything):
            raise
        raise refusal(patcher, f"{reason or 'it fails'} ({error})", learning) from error


class OrdinaryTensors(TorchFunctionMode):
    """Gives patches ordinary copies of the tensors that nodes have made in ComfyUI's inference mode.

    Autograd cannot keep the latter. Each is copied once and stays as long as this mode does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given, named = tree_map(self.ordinary, (args, kwargs))
        return function(*given, **named)

    def ordinary(self, x: Any) -> Any:
        """Return the tensor itself, or its copy if it was made in inference mode."""
        if not isinstance(x, Tensor) or not x.is_inference():
            return x
        if id(x) not in self.copies:
            self.copies[id(x)] = (x, x.detach().clone())
        return self.copies[id(x)][1]


def guarded(
    options: Mapping[str, Any], ordinary: OrdinaryTensors | None, seed: int
) -> dict[str, Any]:
    """Return transformer options whose patches may be learned through and draw the same numbers every time.

    Args:
        options: the graph's own.
        ordinary: what gives patches ordinary tensors; None where nothing is learned.
        seed: of the random numbers, together with the place in the network.
    """
    found = dict(options)
    if "patches" in found:
        found["patches"] = {
            kind: [guard(patch, ordinary, seed) for patch in patches]
            for kind, patches in found["patches"].items()
        }
    if "patches_replace" in found:
        found["patches_replace"] = {
            kind: {
                place: patch and guard(patch, ordinary, seed) for place, patch in replaced.items()
            }
            for kind, replaced in found["patches_replace"].items()
        }
    return found


def guard(patch: Any, ordinary: OrdinaryTensors | None, seed: int) -> Any:
    """Return one patch as :func:`guarded` has it.

    It gets copies, and what is saved while it runs is copied too: it may change either in place.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        options = next((value for value in args if isinstance(value, dict)), {})
        place = f"{options.get('block')} {options.get('block_index')}"
        devices = {x.device for x in args if torch.is_tensor(x) and x.device.type == "cuda"}
        with torch.random.fork_rng(list(devices)):
            torch.manual_seed(seed + zlib.crc32(place.encode()))
            if ordinary is None or not torch.is_grad_enabled():
                return patch(*args, **kwargs)
            given = [x.clone() if torch.is_tensor(x) else x for x in args]
            with keep_saved(), ordinary:
                return patch(*given, **kwargs)

    return call


def core_attention(before: Callable[..., Tensor] | None, learning: bool) -> Callable[..., Tensor]:
    """Return an attention override that always has a gradient: core's own in PyTorch.

    Args:
        before: the override that another node has set. It keeps acting where it has a gradient, and
            is left out where it is nothing but a faster kernel.
        learning: whether the run learns, for the message.
    """
    only_kernel = False

    def attend(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        nonlocal only_kernel
        if before is None or only_kernel:
            return attention_pytorch(*args, **kwargs)
        found = before(attention_pytorch, *args, **kwargs)
        if found.requires_grad or not any(needs_gradient(x) for x in args[:3]):
            return found
        plain = attention_pytorch(*args, **kwargs)
        if torch.dist(found.float(), plain.detach().float()) > KERNEL_ERROR * plain.norm():
            raise UserError(
                f"A node has replaced the MODEL's attention ({origin(before)}) by one without a gradient. "
                "Connect the MODEL from before that node to Learn Concepts."
            )
        only_kernel = True
        return plain

    return attend


def needs_gradient(x: Any) -> bool:
    """Return whether a gradient has to pass through what is computed from `x` now."""
    return torch.is_tensor(x) and x.requires_grad and torch.is_grad_enabled()


@contextmanager
def watching_gradients(unet: nn.Module) -> Iterator[None]:
    """Refuse attention whose output has no gradient although its input has one, while the context is open.

    Some kernels give such an output without a word, and what is learned would be wrong.

    Raises:
        UserError: in the forward pass, with the layer's name.
    """
    expected: dict[str, bool] = {}

    def on_key(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            expected[name] = needs_gradient(output)

        return note

    def on_out(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if expected.pop(name, False) and torch.is_grad_enabled() and not args[0].requires_grad:
                raise UserError(
                    f"The attention of {name} passes no gradient on, so nothing true can be learned. A patch "
                    "on the MODEL computes it with a kernel for drawing alone. Start ComfyUI without "
                    "--use-sage-attention or --use-flash-attention, or connect the MODEL from before the node "
                    "that patches its attention to Learn Concepts."
                )

        return look

    handles = []
    try:
        for name, module in unet.named_modules():
            if isinstance(module, CrossAttention):
                handles.append(module.to_k.register_forward_hook(on_key(name)))
                handles.append(module.to_out.register_forward_pre_hook(on_out(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
