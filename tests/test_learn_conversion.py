"Weights that came as a pickle: tensors pass, programs are refused and not run, and the message names the way."
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

from cvops_wb.core.errors import BadInput, BadModel, WrongUsage
from cvops_wb.learn import build_network, convert_weights
from cvops_wb.learn.networks.conversion import name_stranger


class Payload:
    "Makes a folder when it is unpickled."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}])
def test_a_network_goes_through(tmp_path, wrap):
    network = build_network("small_resnet:8", 3, 32)
    torch.save(wrap(network.state_dict()), tmp_path/"w.pth")
    with pytest.raises(WrongUsage, match="cvops convert .*w.pth"): build_network("small_resnet:8", 3, 32, str(tmp_path/"w.pth"))
    again = build_network("small_resnet:8", 3, 32, str(convert_weights(tmp_path/"w.pth")))
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("write", [
    lambda content, path: torch.save(content, path),
    lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    lambda content, path: path.write_bytes(pickle.dumps(content)),
], ids=["zip", "legacy", "pickle"])
def test_a_program_is_refused_and_not_run(tmp_path, write):
    write({"head.weight": torch.ones(2), "more": Payload(tmp_path/"pwned")}, tmp_path/"evil.pth")
    with pytest.raises(BadModel, match="not run|cannot be read"): convert_weights(tmp_path/"evil.pth")
    assert not (tmp_path/"pwned").exists() and not (tmp_path/"evil.safetensors").exists()
    try: torch.load(tmp_path/"evil.pth", weights_only=False)
    except (pickle.UnpicklingError, RuntimeError): pass
    assert (tmp_path/"pwned").is_dir(), "the payload is real: an ordinary load runs it"


def test_shared_tensors_and_files_that_are_none(tmp_path):
    whole = torch.arange(6.)
    torch.save({"a": whole, "b": whole[:3]}, tmp_path/"shared.pth")
    found = load_file(convert_weights(tmp_path/"shared.pth", tmp_path/"out.safetensors"))
    assert found["b"].tolist() == [0., 1., 2.]
    with pytest.raises(WrongUsage, match="new file"): convert_weights(tmp_path/"shared.pth", tmp_path/"out.safetensors")
    with pytest.raises(BadInput): convert_weights(tmp_path/"none.pth")
    for name, content in {"noise": os.urandom(200), "empty": b"", "nothing to take": b"R.", "half a number": b"J\x01\x02", "no text": b"\x8c\x02\xff\xfe."}.items():
        (tmp_path/f"{name}.pth").write_bytes(content)
        with pytest.raises(BadModel): convert_weights(tmp_path/f"{name}.pth")
    torch.save([1, 2], tmp_path/"list.pth")
    with pytest.raises(BadModel, match="no tensors"): convert_weights(tmp_path/"list.pth")


def test_nobody_is_told_to_run_it_all_the_same():
    told = "Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` will likely succeed. Please file an issue: Unsupported global: GLOBAL posix.system was not an allowed global"
    assert name_stranger(told) == "posix.system" and "weights_only" not in name_stranger("Re-running with weights_only=False will likely succeed")
