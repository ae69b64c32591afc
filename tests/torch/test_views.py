"""A matrix view equals separate parameters, block by block, in the memory of the one that is stored."""

import io
from dataclasses import fields, replace

import pytest
import torch

from orthlin.errors import OptionError, RankError, ShapeError
from orthlin.torch.views import MatrixView, default_view

D, HEADS = 12, 3
HEAD = D // HEADS


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def rows(x, size):
    return [x[i : i + size] for i in range(0, x.shape[0], size)]


def columns(x, size):
    return [x[:, i : i + size] for i in range(0, x.shape[1], size)]


# name: view, tensor, the blocks sliced by hand, a list for every stack
CASES = {
    "plain": (MatrixView(), numbered(4, 6), lambda x: [[x]]),
    "conv1d": (MatrixView(transposed=True), numbered(4, 6), lambda x: [[x.T]]),
    "qkv": (MatrixView(splits=3), numbered(3 * D, D), lambda x: [rows(x, D)]),
    "qkv conv1d": (
        MatrixView(transposed=True, splits=3),
        numbered(D, 3 * D),
        lambda x: [[b.T for b in columns(x, D)]],
    ),
    "heads": (MatrixView(splits=3 * HEADS), numbered(3 * D, D), lambda x: [rows(x, HEAD)]),
    "heads conv1d": (
        MatrixView(transposed=True, splits=3 * HEADS),
        numbered(D, 3 * D),
        lambda x: [[b.T for b in columns(x, HEAD)]],
    ),
    "heads in": (MatrixView(splits=HEADS, split_axis="in"), numbered(5, D), lambda x: [columns(x, HEAD)]),
    "heads in conv1d": (
        MatrixView(transposed=True, splits=HEADS, split_axis="in"),
        numbered(D, 5),
        lambda x: [[b.T for b in rows(x, HEAD)]],
    ),
    "unequal": (MatrixView(splits=(8, 2, 2)), numbered(12, 5), lambda x: [[x[:8]], [x[8:10]], [x[10:]]]),
    "unequal in": (
        MatrixView(splits=(4, 1), split_axis="in", transposed=True),
        numbered(5, 3),
        lambda x: [[x[:4].T], [x[4:].T]],
    ),
    "equal sizes": (MatrixView(splits=(2, 2)), numbered(4, 5), lambda x: [rows(x, 2)]),
    "experts": (MatrixView(batch_ndim=1), numbered(3, 4, 5), lambda x: [list(x)]),
    "experts conv1d": (
        MatrixView(batch_ndim=1, transposed=True),
        numbered(3, 4, 5),
        lambda x: [[e.T for e in x]],
    ),
    "experts split": (
        MatrixView(batch_ndim=1, transposed=True, splits=2),
        numbered(3, 4, 6),
        lambda x: [[e.T[:3] for e in x], [e.T[3:] for e in x]],
    ),
    "alternating": (MatrixView(splits=3, interleave=True), numbered(12, 5), lambda x: [[x[i::3] for i in range(3)]]),
    "alternating conv1d": (
        MatrixView(splits=2, interleave=True, transposed=True),
        numbered(5, 6),
        lambda x: [[x[:, i::2].T for i in range(2)]],
    ),
    "alternating in": (
        MatrixView(splits=2, interleave=True, split_axis="in"),
        numbered(4, 6),
        lambda x: [[x[:, ::2], x[:, 1::2]]],
    ),
    "alternating experts": (
        MatrixView(splits=2, interleave=True, batch_ndim=1),
        numbered(3, 6, 5),
        lambda x: [[e[i::2] for e in x] for i in range(2)],
    ),
    "alternating experts conv1d": (
        MatrixView(splits=2, interleave=True, batch_ndim=1, transposed=True),
        numbered(3, 5, 6),
        lambda x: [[e[:, i::2].T for e in x] for i in range(2)],
    ),
    "two batch axes": (MatrixView(batch_ndim=2), numbered(2, 3, 4, 5), lambda x: [[e for a in x for e in a]]),
    "convolution 1": (MatrixView(), numbered(4, 3, 5), lambda x: [[x.reshape(4, 15)]]),
    "convolution 2": (MatrixView(), numbered(4, 3, 2, 2), lambda x: [[x.reshape(4, 12)]]),
    "convolution 3": (MatrixView(), numbered(4, 3, 2, 2, 2), lambda x: [[x.reshape(4, 24)]]),
    "grouped convolution": (MatrixView(splits=2), numbered(4, 3, 2, 2), lambda x: [rows(x.reshape(4, 12), 2)]),
    "empty": (MatrixView(splits=3), numbered(0, 5), lambda x: [[x, x, x]]),
}
every_case = pytest.mark.parametrize(("view", "x", "by_hand"), CASES.values(), ids=CASES)


@every_case
def test_blocks_are_those_sliced_by_hand(view, x, by_hand):
    found, expected = view.view(x), by_hand(x)
    assert len(found) == len(expected)
    for stack, blocks in zip(found, expected, strict=True):
        assert torch.equal(stack, torch.stack(blocks))


@every_case
def test_shapes_are_those_of_the_stacks(view, x, by_hand):
    assert view.shapes(x.shape) == [tuple(stack.shape) for stack in view.view(x)]


@every_case
def test_stacks_lie_in_the_memory_of_the_tensor_and_cover_it_once(view, x, by_hand):
    x = x.clone()
    for stack in view.view(x):
        assert stack.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        stack.add_(0.5)
    assert torch.equal(x, x.floor() + 0.5)
    assert torch.equal(x.flatten().floor(), torch.arange(x.numel(), dtype=x.dtype))


@every_case
def test_a_parameter_is_written_without_gradient(view, x, by_hand):
    p = torch.nn.Parameter(x.clone())
    with torch.no_grad():
        for stack in view.view(p):
            stack.zero_()
    assert not p.any()


@every_case
def test_other_strides_read_the_same_with_copy(view, x, by_hand):
    reversed_strides = x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    for a, b in zip(view.view(reversed_strides, copy=True), view.view(x), strict=True):
        assert torch.equal(a, b)


@every_case
def test_a_plain_dict_gives_the_view_back(view, x, by_hand):
    fields_ = view.as_dict()
    assert MatrixView(**fields_) == view
    assert MatrixView(**{k: list(v) if isinstance(v, tuple) else v for k, v in fields_.items()}) == view
    file = io.BytesIO()
    torch.save(fields_, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == fields_


def test_a_matrix_with_swapped_strides_is_viewed_without_copy():
    x = numbered(6, 4).T
    [stack] = MatrixView(splits=2).view(x)
    assert stack.data_ptr() == x.data_ptr()


def test_a_channels_last_weight_has_no_view_but_a_copy():
    x = numbered(4, 3, 2, 2)
    weight = x.to(memory_format=torch.channels_last)
    with pytest.raises(ShapeError, match=r"channels_last.*copy=True"):
        MatrixView().view(weight)
    assert torch.equal(MatrixView().view(weight, copy=True)[0], x.reshape(1, 4, 12))


@pytest.mark.parametrize(
    ("view", "shape", "words"),
    [
        (MatrixView(splits=3), (8, 6), r"splits: 3 equal blocks do not divide the 8 out entries of shape \(8, 6\)"),
        (MatrixView(splits=4, split_axis="in"), (8, 6), "4 equal blocks do not divide the 6 in entries"),
        (MatrixView(splits=(4, 2)), (8, 6), r"sizes \(4, 2\) add up to 6, not to the 8 out entries"),
        (MatrixView(), (8,), r"expected 0 batch axes, out and in, got shape \(8,\)"),
        (MatrixView(batch_ndim=1), (8, 6), "expected 1 batch axes"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(view, shape, words):
    with pytest.raises(ShapeError, match=words):
        view.view(torch.zeros(shape))
    with pytest.raises(ShapeError, match=words):
        view.shapes(shape)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"transposed": 1}, OptionError),
        ({"interleave": 1}, OptionError),
        ({"splits": (2, 2), "interleave": True}, OptionError),
        ({"splits": 0}, RankError),
        ({"splits": 1.5}, RankError),
        ({"splits": ()}, OptionError),
        ({"splits": (2, 0)}, RankError),
        ({"split_axis": "rows"}, OptionError),
        ({"batch_ndim": -1}, RankError),
    ],
)
def test_bad_fields_are_an_error_that_names_them(options, error):
    with pytest.raises(error, match=next(iter(options))):
        MatrixView(**options)


def test_a_view_is_frozen_hashable_and_plain():
    view = MatrixView(splits=[4, 2])
    assert replace(view, splits=(4, 2)) == view
    assert len({view, MatrixView(splits=(4, 2))}) == 1
    assert [field.name for field in fields(view)] == ["transposed", "splits", "split_axis", "batch_ndim", "interleave"]


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 2), (4, 3, 2, 2, 2)])
def test_the_default_is_the_plain_view(shape):
    assert default_view(shape) == MatrixView()


@pytest.mark.parametrize(
    ("shape", "words"), [((4, 6, 5), "experts.*give a view"), ((4,), "AdamW"), ((1,) * 6, "2, 4 or 5")]
)
def test_shapes_that_do_not_tell_have_no_default(shape, words):
    with pytest.raises(ShapeError, match=words):
        default_view(shape)
