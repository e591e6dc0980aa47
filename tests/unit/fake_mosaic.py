"""As much of Pallas for Mosaic GPU as our kernels use, in threads, for machines without one.

Every warpgroup is a thread. What a GPU does later is done as late as it may be: a product when it
is waited for, out of what then lies in shared memory. So a block that is overwritten too soon gives
wrong numbers, and a barrier that nobody completes an error after a while.
"""

import itertools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

PATIENCE = 20.0  # seconds


class _Cell:
    """An array that is written in place, or a part of one."""

    def __init__(self, array: np.ndarray, index: Any = ...) -> None:
        self._array, self._index = array, index
        self.dtype = array.dtype

    @property
    def at(self) -> "_At":
        return _At(lambda index: _Cell(self._array, _plain(index)))

    @property
    def value(self) -> np.ndarray:
        return self._array[self._index]

    def transpose(self, axes: tuple[int, ...]) -> "_Later":
        return _Later(lambda: self.value.transpose(axes))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __getitem__(self, index: Any) -> jax.Array:
        return jnp.asarray(self.value[_plain(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        whole = self._index if index is ... else _plain(index)
        assert index is ... or self._index is ...
        assert self._array[whole].shape == value.shape and self.dtype == value.dtype
        self._array[whole] = np.asarray(value)


class _Later:
    def __init__(self, read: Callable[[], np.ndarray]) -> None:
        self._read = read

    @property
    def value(self) -> np.ndarray:
        return self._read()


class _At:
    def __init__(self, give: Callable[[Any], Any]) -> None:
        self._give = give

    def __getitem__(self, index: Any) -> Any:
        return self._give(index)


def _plain(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_plain(i) for i in index)
    if isinstance(index, slice):
        return index
    return int(index)


class _Barrier:
    """Complete whenever so many have arrived; a thread waits for each time once."""

    def __init__(self, arrivals: int) -> None:
        self._arrivals, self._arrived, self._changed = arrivals, 0, threading.Condition()
        self._own = threading.local()

    def arrive(self) -> None:
        with self._changed:
            self._arrived += 1
            self._changed.notify_all()

    def wait(self) -> None:
        self._own.count = getattr(self._own, "count", 0) + 1
        needed = self._own.count * self._arrivals
        with self._changed:
            if not self._changed.wait_for(lambda: self._arrived >= needed, PATIENCE):
                raise TimeoutError("nobody completes the barrier")
            # A barrier has one bit: who is a whole turn behind waits for ever, or not at all.
            assert self._arrived < needed + self._arrivals * 2, "a turn was missed"


class _Barriers:
    def __init__(self, num_arrivals: int = 1, num_barriers: int = 1) -> None:
        self.every = [_Barrier(num_arrivals) for _ in range(num_barriers)]

    @property
    def at(self) -> _At:
        return _At(lambda index: self.every[int(index)])


class _Layout:
    def reduce(self, axis: int) -> str:
        return f"without axis {axis}"


def _strided(shape: tuple[int, ...], vec_size: int) -> str:
    assert len(shape) == 1 and shape[0] % (128 * vec_size) == 0
    return f"{vec_size} in every thread, and again"


class Mosaic:
    """The modules `gpu`, `pl` and `lax` of a kernel; started: the blocks that have run.

    products: of each the number of its block and its warpgroup, in their order.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self.started = 0
        self.products: list[tuple[int, int]] = []
        self.gpu = types.SimpleNamespace(
            ACC=lambda shape, dtype: ("ACC", shape, dtype),
            SMEM=lambda shape, dtype, transforms=(): ("SMEM", shape, dtype),
            Barrier=lambda **counts: ("barrier", counts),
            TilingTransform=tuple,
            SwizzleTransform=int,
            CompilerParams=lambda **_: None,
            Layout=types.SimpleNamespace(WGMMA=_Layout(), WG_STRIDED=_strided),
            layout_cast=lambda x, layout: x,
            broadcasted_iota=lambda dtype, shape, axis, layout: lax.broadcasted_iota(
                dtype, shape, axis
            ),
            set_max_registers=lambda count, action: None,
            commit_smem=lambda: setattr(self._own, "committed", True),
            wait_smem_to_gmem=self._send,
            barrier_wait=_Barrier.wait,
            barrier_arrive=_Barrier.arrive,
            copy_gmem_to_smem=self._bring,
            copy_smem_to_gmem=self._ask_to_send,
            wgmma=self._multiply,
            wgmma_accumulator_load=self._load,
            kernel=self._kernel,
            Mesh=lambda **counts: counts,
        )
        self.pl = types.SimpleNamespace(
            ds=lambda start, size: slice(int(start), int(start) + size),
            when=lambda condition: lambda run: run() if condition else None,
            loop=lambda low, high: lambda run: [run(i) for i in range(low, high)] and None,
            run_scoped=self._run_scoped,
            kernel=lambda body, *, mesh, **rest: self._kernel(body, **mesh, **rest),
        )
        self.lax = types.SimpleNamespace(
            axis_index=lambda name: self._own.place[name],
            fori_loop=_loop,
            broadcast_in_dim=lax.broadcast_in_dim,
            empty=lambda shape, dtype: jnp.full(shape, jnp.nan, dtype),
            rem=lax.rem,
            div=lax.div,
            rsqrt=lax.rsqrt,
            optimization_barrier=lambda x: x,
        )

    def _bring(self, source: _Cell, target: _Cell, barrier: _Barrier) -> None:
        target[...] = source.value
        barrier.arrive()

    def _ask_to_send(self, source: _Cell, target: _Cell) -> None:
        assert self._own.committed, "what is in shared memory may not be seen"
        self._own.leaving.append((source, target))

    def _send(self, count: int) -> None:
        while len(self._own.leaving) > count:
            source, target = self._own.leaving.pop(0)
            target[...] = source.value
        self._own.committed = False  # what is written next is not

    def _multiply(self, *operands: Any) -> None:
        self.products.append((self.started, self._own.place[self._group]))
        self._own.pending.append(operands)

    def _load(self, accumulator: _Cell, wait_n: int) -> jax.Array:
        pending = self._own.pending
        while len(pending) > wait_n:
            into, left, right = pending.pop(0)
            product = jnp.matmul(
                jnp.asarray(getattr(left, "value", left), jnp.float32),
                jnp.asarray(right.value, jnp.float32),
                precision="highest",
            )
            into[...] = into.value + np.asarray(product)
        assert all(into is not accumulator for into, *_ in pending)
        return jnp.asarray(accumulator.value)

    def _run_scoped(self, run: Callable, *wanted: Any, collective_axes: str | None = None) -> Any:
        found = []
        for kind, *own in wanted:
            if kind == "barrier":
                found.append(_Barriers(**own[0]))
            else:
                # Shared memory holds anything at first, an accumulator zeros.
                start = np.nan if kind == "SMEM" else 0.0
                found.append(_Cell(np.full(own[0], start, own[1])))
        if collective_axes is None:
            return run(*found)
        return self._in_threads(lambda: run(*found))

    def _in_threads(self, run: Callable[[], None]) -> None:
        place, errors = self._own.place, []

        def group(number: int) -> None:
            self._own.place, self._own.pending = {**place, self._group: number}, []
            self._own.leaving, self._own.committed = [], False
            try:
                run()
                assert not self._own.pending, "nobody waited for a product"
                assert not self._own.leaving, "nobody waited for what leaves shared memory"
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=group, args=(i,)) for i in range(self._groups)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _kernel(
        self,
        body: Callable,
        *,
        out_type: Any = (),
        grid: tuple[int, ...],
        grid_names: tuple[str, ...],
        compiler_params: None,
        num_threads: int = 1,
        thread_name: str | None = None,
    ) -> Callable:
        del compiler_params
        self._groups, self._group = num_threads, thread_name

        def call(*arrays: jax.Array) -> Any:
            wanted, tree = jax.tree.flatten(out_type)
            results = [np.full(one.shape, np.nan, one.dtype) for one in wanted]
            refs = [_Cell(np.array(array[...])) for array in arrays]
            for place in _places(grid):
                self._own.place = dict(zip(grid_names, place, strict=True))
                body(*refs, *map(_Cell, results))
                self.started += 1
            for array, ref in zip(arrays, refs, strict=True):
                if isinstance(array, jax.Ref):
                    array[...] = ref.value
            return jax.tree.unflatten(tree, map(jnp.asarray, results))

        return call


def in_place_of_mosaic(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Mosaic:
    """What a kernel's module has for Pallas from now on."""
    fake = Mosaic()
    for name in ("gpu", "pl", "lax"):
        monkeypatch.setattr(module, name, getattr(fake, name))
    return fake


def _places(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, grid))


def _loop(low: int, high: int, run: Callable[[int, Any], Any], carry: Any) -> Any:
    for i in range(low, high):
        carry = run(i, carry)
    return carry
