"""The memory bank: first rows, reads, cosines in both forms, writes, several processes, checkpoints."""

import copy

import pytest
import torch
import torch.nn.functional as F

from plugins.targets import IndexedBank
from plugins.targets import bank as bank_module


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _reference_write(rows, index, z, momentum):
    """Row by row in float64, in the order of the batch; the last row of an image is used, with the old bank."""
    old, new = rows.double(), rows.double().clone()
    for i, row in zip(index.tolist(), z.double(), strict=True):
        mixed = momentum * old[i] + (1 - momentum) * row / row.norm()
        new[i] = mixed / mixed.norm()
    return new


# --- rows -----------------------------------------------------------------------------------------------------------


def test_first_rows_are_unit_random_and_the_same_everywhere():
    bank = IndexedBank(2000, 16)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(2000))
    torch.manual_seed(7)
    assert torch.equal(bank.rows, IndexedBank(2000, 16).rows), "they depend on the bank's seed alone"
    assert not torch.equal(bank.rows, IndexedBank(2000, 16, seed=1).rows)
    moment = bank.rows.T @ bank.rows / 2000 * 16
    assert (moment - torch.eye(16)).abs().max() < 0.2, "no direction is preferred"  # 5 standard deviations
    assert bank.rows.mean(0).abs().max() < 0.05


def test_a_known_update():
    bank = IndexedBank(2, 2, momentum=0.5)
    bank.rows.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    bank.write(torch.tensor([1]), torch.tensor([[0.0, 7.0]]))
    torch.testing.assert_close(bank.rows, torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]]))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("index", [[3, 0, 5], [3, 0, 3, 3, 0], [4] * 6])
def test_write_equals_the_slow_reference(momentum, index):
    bank = IndexedBank(7, 4, momentum=momentum)
    index, z = torch.tensor(index), torch.randn(len(index), 4)
    before = bank.rows.clone()
    expected = _reference_write(before, index, z, momentum)
    bank.write(index, z)
    torch.testing.assert_close(bank.rows.double(), expected, rtol=1e-6, atol=1e-6)
    absent = [i for i in range(7) if i not in index.tolist()]
    assert torch.equal(bank.rows[absent], before[absent])
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(7))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_row_without_direction_changes_nothing(value):
    bank = IndexedBank(3, 2, momentum=0.0)
    before = bank.rows.clone()
    bank.write(torch.tensor([0, 2]), torch.tensor([[value, value], [0.0, 3.0]]))
    assert torch.equal(bank.rows[:2], before[:2])
    torch.testing.assert_close(bank.rows[2], torch.tensor([0.0, 1.0]))


def test_opposite_rows_keep_the_old_row():
    """m b + (1 - m) u is zero: there is no direction to normalise."""
    bank = IndexedBank(1, 2, momentum=0.5)
    before = bank.rows.clone()
    bank.write(torch.tensor([0]), -before)
    assert torch.equal(bank.rows, before)


def test_a_write_has_no_gradient_and_a_read_is_a_copy():
    bank = IndexedBank(3, 2)
    z = torch.randn(2, 2, requires_grad=True)
    read = bank.read(torch.tensor([0, 1]))
    kept = read.clone()
    bank.write(torch.tensor([0, 1]), z)
    assert not bank.rows.requires_grad and not read.requires_grad and torch.equal(read, kept)


# --- cosines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("entries", [1, 25, 2**24])
def test_logits_equal_dot_products_in_both_forms(monkeypatch, few, entries):
    monkeypatch.setattr(bank_module, "FEW", few)
    monkeypatch.setattr(bank_module, "ENTRIES", entries)
    bank = IndexedBank(11, 5)
    u = F.normalize(torch.randn(4, 5, dtype=torch.float64), dim=1).requires_grad_()
    index = torch.randint(0, 11, (4, 6))
    index[0, 1] = index[0, 0]
    expected = (u[:, None] * bank.rows.double()[index]).sum(-1)
    found = bank.logits(u, index)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    outer = torch.randn_like(found)
    for one, other in zip(torch.autograd.grad(found, u, outer), torch.autograd.grad(expected, u, outer), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: bank.logits(x, index), u)


def test_logits_make_no_tensor_of_every_row_and_index():
    """B K D numbers would be 4 million here; the largest that is made has B n or B K."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    for size in (1000, 20_000):
        bank = IndexedBank(size, 64)
        u = F.normalize(torch.randn(128, 64), dim=1).requires_grad_()
        index = torch.randint(0, size, (128, 500))
        with Sizes():
            bank.logits(u, index).sum().backward()
    assert largest <= max(128 * 1000, 20_000 * 64)


# --- several processes ----------------------------------------------------------------------------------------------


def _write(comm, index, z):
    bank = IndexedBank(9, 4)
    bank.write(index, z, comm)
    return bank.rows


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(3, 3), (4, 2), (1, 2, 3), (0, 6)])
def test_banks_of_all_ranks_equal_that_of_the_joined_batch(ranks, counts):
    index, z = torch.tensor([2, 5, 2, 8, 5, 0]), torch.randn(6, 4)
    bank = IndexedBank(9, 4)
    bank.write(index, z)
    parts = list(zip(index.split(list(counts)), z.split(list(counts)), strict=True))
    for rows in ranks.run(_write, parts):
        assert torch.equal(rows, bank.rows), "an image on two ranks has the row of the later rank"


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_an_empty_bank_takes_the_size_of_a_checkpoint():
    saved = IndexedBank(6, 3)
    saved.write(torch.tensor([4]), torch.randn(1, 3))
    bank = IndexedBank(None, 3)
    assert bank.size == 0
    bank.load_state_dict(saved.state_dict())
    assert torch.equal(bank.rows, saved.rows)
    bank.allocate(6)
    assert torch.equal(bank.rows, saved.rows), "the rows of the checkpoint stay"
    with pytest.raises(ValueError, match="memory bank holds 6 images, but the training set has 7"):
        bank.allocate(7)


def test_a_bank_of_another_size_is_refused_by_strict_loading():
    with pytest.raises(RuntimeError, match="size mismatch for rows"):
        IndexedBank(5, 3).load_state_dict(IndexedBank(6, 3).state_dict())


def test_a_copy_is_independent():
    bank = IndexedBank(3, 2, momentum=0.0)
    other = copy.deepcopy(bank)
    other.write(torch.tensor([0]), torch.randn(1, 2))
    assert not torch.equal(bank.rows, other.rows)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: IndexedBank(3, 0), "dim must be in [1, inf)"),
        (lambda: IndexedBank(0, 2), "size must be in [1, inf)"),
        (lambda: IndexedBank(3, 2, momentum=1.5), "momentum must be in [0, 1]"),
        (lambda: IndexedBank(None, 2).read(torch.tensor([0])), "the memory bank is empty"),
        (lambda: IndexedBank(3, 2).read(torch.tensor([0.0])), "index must be of dtype int64, got torch.float32"),
        (
            lambda: IndexedBank(3, 2).write(torch.tensor([0, 1]), torch.ones(1, 2)),
            "with the same B, got shapes (2,) and",
        ),
        (lambda: IndexedBank(3, 2).logits(torch.ones(1, 3), torch.zeros(1, 4, dtype=torch.int64)), "u [B, 2]"),
    ],
)
def test_mistakes_are_sentences(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)
