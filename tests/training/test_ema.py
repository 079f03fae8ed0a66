"""The average of the weights against its closed form, and swapping it in and out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlhf_drive.errors import CheckpointError, ConfigError, TrainingError
from rlhf_drive.training.ema import EmaWeights


class Net(nn.Module):
    """Trainable and frozen weights, and buffers of three kinds."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.learned = nn.Parameter(torch.randn(7, 3, generator=generator).to(dtype))
        self.frozen = nn.Parameter(torch.randn(4, generator=generator).to(dtype), requires_grad=False)
        self.register_buffer("load", torch.randn(2, generator=generator))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.arange(5.0), persistent=False)

    def move(self, seed: int) -> None:
        """Everything that training could move."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.learned += torch.randn(7, 3, generator=generator).to(self.learned)
            self.load += torch.randn(2, generator=generator)
            self.count += 1


def everything(net: nn.Module) -> dict[str, Tensor]:
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {name: value.detach().clone() for name, value in named.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("updates", [0, 1, 2, 40])
def test_closed_form(decay: float, updates: int) -> None:
    net = Net()
    ema = EmaWeights(net, decay)
    history = [everything(net)]
    for i in range(updates):
        net.move(i + 1)
        ema.update(net)
        history.append(everything(net))
    # decay^n w_0 + (1 - decay) sum_i decay^(n-i) w_i, in float64
    for name in ("learned", "load"):
        values = torch.stack([h[name].double() for h in history])
        powers = decay ** torch.arange(updates, -1, -1).double()
        powers[1:] *= 1 - decay
        assert float(powers.sum()) == pytest.approx(1.0, abs=1e-12)  # an average, whatever the count
        expected = torch.tensordot(powers, values, dims=1)
        torch.testing.assert_close(ema.state_dict()[name].double(), expected, atol=3e-6, rtol=0)
    assert int(ema.state_dict()["updates"]) == updates


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    """Steps of 1 % of the way would be lost in bfloat16, whose neighbours near 1 are 0.4 and 0.8 % apart."""
    net = Net(torch.bfloat16)
    with torch.no_grad():
        net.learned.fill_(1.0)
    ema = EmaWeights(net, 0.999)
    with torch.no_grad():
        net.learned.fill_(1.5)
    for _ in range(100):
        ema.update(net)
    average = ema.state_dict()["learned"]
    assert average.dtype == torch.float32
    # 1.5 - 0.5 * 0.999^100
    torch.testing.assert_close(average, torch.full((7, 3), 1.5 - 0.5 * 0.999**100), atol=1e-5, rtol=0)
    with ema.applied(net):
        assert net.learned.dtype == torch.bfloat16
        torch.testing.assert_close(net.learned.float(), average, atol=0.004, rtol=0)


def test_swapped_in_and_back_to_the_bit() -> None:
    net = Net()
    ema = EmaWeights(net, 0.9)
    for i in range(3):
        net.move(i + 1)
        ema.update(net)
    own, averages = everything(net), {n: v.clone() for n, v in ema.state_dict().items()}
    for _ in range(2):
        with ema.applied(net):
            inside = everything(net)
            with ema.applied(net):
                assert same(everything(net), inside)
            assert same(everything(net), inside)
        assert same(everything(net), own)
    with pytest.raises(RuntimeError, match="evaluation failed"), ema.applied(net):
        raise RuntimeError("evaluation failed")
    assert same(everything(net), own)
    for name in ("learned", "load"):
        assert torch.equal(inside[name], averages[name])
        assert not torch.equal(inside[name], own[name])
    for name in ("frozen", "count", "table"):  # the policy's own
        assert torch.equal(inside[name], own[name])
    assert same(ema.state_dict(), averages)
    assert net.learned.requires_grad


def test_what_does_not_move_stays_to_the_bit() -> None:
    net = Net()
    ema = EmaWeights(net, 0.977)
    for _ in range(50):
        ema.update(net)
    assert torch.equal(ema.state_dict()["learned"], net.learned)
    assert set(ema.state_dict()) == {"learned", "load", "updates"}


def test_resumed_average_goes_on_to_the_bit() -> None:
    net, other = Net(), Net()
    whole, first = EmaWeights(net, 0.9), EmaWeights(other, 0.9)
    for i in range(6):
        net.move(i)
        whole.update(net)
        other.move(i)
        first.update(other)
        if i == 2:
            kept = {name: value.clone() for name, value in first.state_dict().items()}
            first = EmaWeights(Net(), 0.9)
            first.load_state_dict(kept)
    assert same(whole.state_dict(), first.state_dict())
    assert whole.updates == 6


def test_bad_use_is_refused() -> None:
    net = Net()
    for decay in (0.0, 1.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"rl\.ema_decay = "):
            EmaWeights(net, decay)
    ema = EmaWeights(net, 0.9)
    with ema.applied(net), pytest.raises(TrainingError, match="average the average"):
        ema.update(net)
    ema.update(net)
    state = ema.state_dict()
    for change in ({"learned": torch.zeros(3)}, {"extra": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match=f"{next(iter(change))} differ"):
            ema.load_state_dict({**state, **change})
    with pytest.raises(CheckpointError, match="updates differ"):
        ema.load_state_dict({n: v for n, v in state.items() if n != "updates"})
