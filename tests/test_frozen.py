import pytest
import torch
from torch import nn

from distill.frozen import Frozen


class Holder(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.own = nn.Linear(3, 3)
        self.teacher = Frozen(network)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))


def test_the_holder_neither_counts_nor_saves_what_it_borrowed(network):
    holder = Holder(network)
    assert set(holder.state_dict()) == {"own.weight", "own.bias"}
    assert {name for name, _ in holder.named_parameters()} == {"own.weight", "own.bias"}
    assert list(holder.named_buffers()) == []
    assert [type(module) for module in holder.modules()] == [Holder, nn.Linear, Frozen]
    assert list(holder.teacher.children()) == []


def test_a_saved_holder_loads_without_the_borrowed_weights(network):
    holder, other = Holder(network), Holder(nn.Linear(3, 7))
    other.load_state_dict(holder.state_dict(), strict=True)
    assert torch.equal(other.own.weight, holder.own.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_follows_the_holder_to_another_type(network, dtype):
    holder = Holder(network).to(dtype)
    assert network[0].weight.dtype == network[1].running_mean.dtype == dtype
    assert holder.teacher(torch.randn(2, 3, dtype=dtype)).dtype == dtype


def test_it_follows_the_holder_to_another_device(network):
    Holder(network).to("meta")
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_it_stays_in_eval_mode_while_the_holder_trains(network):
    network.train()
    holder = Holder(network).train()
    x = torch.randn(4, 3)
    before = network[1].running_mean.clone()
    assert holder.training and not any(module.training for module in network.modules())
    assert torch.equal(holder.teacher(x), holder.teacher(x))
    assert torch.equal(network[1].running_mean, before)


def test_gradients_flow_through_it_to_the_input_and_stop_at_its_parameters(network):
    x = torch.randn(4, 3, requires_grad=True)
    weight, scale = network[0].weight.detach(), (network[1].running_var + network[1].eps).rsqrt()
    Holder(network).teacher(x).sum().backward()
    torch.testing.assert_close(x.grad, (scale[:, None] * weight).sum(0).expand(4, 3))
    assert [parameter.grad for parameter in network.parameters()] == [None] * 4


def test_two_holders_share_one_network(network):
    first, second = Frozen(network), Frozen(network)
    assert first.network is second.network is network
