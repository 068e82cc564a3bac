"""Everything about a model that a node could leave changed, as one comparable value."""

import hashlib
import types

import torch

PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# The host's own account of what is loaded where.
HOSTS_OWN = {"device", "model_loaded_weight_memory", "model_lowvram", "lowvram_patch_counter", "model_offload_buffer_memory"}


class Held:
    """An object compared by identity, and kept so that its address is not given to another."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Held) and self.value is other.value

    def __hash__(self):
        return id(self.value)

    def __repr__(self):
        return f"<{type(self.value).__name__} at {id(self.value):#x}>"


def frozen(value):
    """`value` with containers opened and everything else held."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    if isinstance(value, set | frozenset):
        return {Held(item) for item in value}
    # A method is a new object at each access.
    if isinstance(value, types.MethodType):
        return [Held(value.__self__), Held(value.__func__)]
    return Held(value)


def checksum(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def of_model(model: torch.nn.Module) -> dict:
    """Every module's `__dict__` with its hook tables, and the checksum of every weight and buffer."""
    weights = {name: checksum(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.numel()}
    modules = {
        name: {key: frozen(value) for key, value in vars(module).items() if key not in HOSTS_OWN} for name, module in model.named_modules()
    }
    return {"modules": modules, "weights": weights}


def of_patcher(patcher) -> dict:
    """A patcher's options, patches, callbacks, wrappers and attachments; what it shares with its model is left to `of_model`."""
    ours = {key: value for key, value in vars(patcher).items() if key not in ("model", "parent", "pinned", "size")}
    return {key: frozen(value) for key, value in ours.items()}


def differences(before: dict, after: dict, path: str = "") -> list[str]:
    """Where two states differ, as readable paths."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in before.keys() | after.keys():
            missing = object()
            one, other = before.get(key, missing), after.get(key, missing)
            if one is missing or other is missing:
                found.append(f"{path}/{key} {'appeared' if one is missing else 'vanished'}")
            else:
                found += differences(one, other, f"{path}/{key}")
        return found
    return [] if before == after else [f"{path}: {before!r} became {after!r}"]
