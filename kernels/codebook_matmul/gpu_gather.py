"""Additive codes on a GPU for few tokens and small weights, by Pallas Mosaic GPU: entries are gathered, not products.

Tables of partial products cost every block the products of all entries with its inputs, which a weight of a few hundred
rows does not repay. Here a block holds the inputs and the codebooks in shared memory, and a thread multiplies the entries
of four codes, a word of `layout.banked_words`, with their groups of inputs. All is float32 but the entries.

What such a product takes is latency. So all that a block reads of global memory it asks for at once, there are no more
blocks than multiprocessors, and products of one input with several weights are one launch, whose blocks know from their
index which weight they have; for norms and gates see `gpu_fused`. A residual is asked for in the beginning and added in
the end.

A warp has 8 outputs and the 4 words of a line of each; lines are dealt out to the warps of these outputs, whose sums are
added up in a fixed order.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.codebook_matmul import gpu_fused
from jaxquant.kernels.codebook_matmul.gpu_gather_plan import OUTPUTS, PIECE, WARP, WARPGROUP, Plan
from jaxquant.kernels.codebook_matmul.layout import LANES, Weight
from jaxquant.prologue import Prologue


class ThreadProgram:
    """The program of one thread.

    Args:
      plan: sizes.
      place: index of the block among those of the weight, and of the chunk of tokens.
      out: outputs of the weight.
      addresses: of x [tokens, in], words [lines, out, 4], codebooks [M, K * d] and y [tokens, out], and of the block's
        inputs, codebooks and sums.
      given: addresses of "scale", "prologue" (norm's weight [in] or gate [tokens, in]) and "residual" [tokens, out], if
        there are such.
    """

    def __init__(
        self,
        plan: Plan,
        place: tuple[t.Value, t.Value],
        out: t.Int,
        addresses: Sequence[t.Value],
        given: Mapping[str, t.Value],
    ):
        self.plan, self.out, self.given = plan, out, given
        block, self.chunk = place
        self.x, self.words, self.books, self.y, self.inputs, self.entries, self.sums = addresses
        self.thread, self.place = t.thread_index(), t.warp_index()
        lane = t.rem(self.thread, WARP)
        self.tile, self.warp = t.div(self.place, plan.warps), t.rem(self.place, plan.warps)
        self.local, self.word = t.rem(lane, OUTPUTS), t.div(lane, OUTPUTS)
        self.first_output = t.mul(block, OUTPUTS * plan.tiles)
        self.output = t.add(self.first_output, t.mul(self.tile, OUTPUTS), self.local)

    def run(self) -> None:
        """Everything."""
        words = [self.load_word(turn) for turn in range(self.plan.turns)]
        books, inputs, epilogue = self.load_books(), self.load_inputs(), self.load_epilogue()
        for inside, values, place in books:
            with t.when(inside):
                t.store_four(values, place)
        self.store_inputs(inputs)
        t.block_barrier()
        sums = [t.number(0.0)] * self.plan.chunk
        for turn, word in enumerate(words):
            sums = self.add_products(turn, word, sums)
        self.store_sums(sums)
        t.block_barrier()
        self.finish(epilogue)

    def line(self, turn: int) -> t.Value:
        """The warp's line of a turn; there may be no such line."""
        return t.add(self.warp, turn * self.plan.warps)

    def load_word(self, turn: int) -> t.Value:
        """A word of the thread's output, four codes; some other one where there is none."""
        line, output = t.least(self.line(turn), self.plan.lines - 1), t.least(self.output, t.sub(self.out, 1))
        place = t.mul(t.add(t.mul(line, self.out), output), 16)
        return t.load_word(t.at(self.words, place, t.mul(self.word, 4)))

    def dealt(self, count: int) -> list[tuple[t.Value, t.Value]]:
        """The thread's numbers up to `count`, and whether they are below it; some other number where they are not."""
        numbers = [t.add(self.thread, first) for first in range(0, count, self.plan.threads)]
        return [(t.less(number, count), t.least(number, count - 1)) for number in numbers]

    def load_books(self) -> list[tuple[t.Value, list[t.Value], t.Value]]:
        """The thread's pieces of the codebooks: whether there is one, its words, and its place in shared memory."""
        places = [(inside, t.mul(piece, PIECE)) for inside, piece in self.dealt(self.plan.book_bytes // PIECE)]
        return [(inside, t.stream_words(t.at(self.books, p)), t.at(self.entries, p)) for inside, p in places]

    def load_inputs(self) -> list[list[Any]]:
        """The inputs of each token, in pieces of four: (there, values, gates, scales, inside, place).

        That is whether there are such inputs, the inputs, their gates, their scales, whether there is such a piece, and its
        place in shared memory. They lie as float32 [token, d / 4, group, 4], with zeros beyond the last group.
        """
        plan, quarters, tokens = self.plan, self.plan.dimension // 4, []
        for token in range(plan.chunk):
            row = t.least(t.add(t.mul(self.chunk, plan.chunk), token), plan.tokens - 1)
            pieces = []
            for inside, piece in self.dealt(plan.room * quarters):
                there, own = t.less(piece, plan.columns // 4), t.least(piece, plan.columns // 4 - 1)
                values = self.load_four("x", self.x, own, row)
                gates = self.load_four("prologue", self.given["prologue"], own, row) if plan.activation else []
                group, quarter = t.div(piece, quarters), t.rem(piece, quarters)
                place = t.mul(t.add(t.mul(quarter, plan.room), group), 16)
                place = t.at(self.inputs, place, 4 * token * plan.room * plan.dimension)
                pieces.append((there, values, gates, self.load_scale(own), inside, place))
            tokens.append(pieces)
        return tokens

    def load_four(self, name: str, array: t.Value, piece: t.Value, row: t.Int = 0) -> list[t.Value]:
        """A piece of a row of [rows, in]."""
        line = t.at(array, t.mul(row, self.plan.columns * self.plan.size(name)))
        return t.load(t.at(line, t.mul(piece, 4 * self.plan.size(name))), self.plan.dtypes[name], 4)

    def load_scale(self, piece: t.Value) -> list[t.Value]:
        """What the four inputs of a piece are multiplied by for all tokens; nothing for ones."""
        plan, factors = self.plan, []
        if plan.norm is not None:
            weight = self.load_four("prologue", self.given["prologue"], piece)
            factors = [t.fadd(x, t.number(plan.norm[1])) for x in weight] if plan.norm[1] else weight
        if plan.scale == "columns":
            place = t.mul(t.div(piece, plan.dimension // 4), plan.size("scale"))
            (scale,) = t.load(t.at(self.given["scale"], place), plan.dtypes["scale"])
            factors = [t.fmul(x, scale) for x in factors] if factors else [scale] * 4
        return factors

    def store_inputs(self, tokens: Sequence[Any]) -> None:
        """Scales the inputs and puts them into shared memory, and each warp's sums of their squares behind the sums."""
        plan, zero = self.plan, t.number(0.0)
        for token, pieces in enumerate(tokens):
            squares = zero
            for there, values, gates, scales, inside, place in pieces:
                if plan.norm is not None:
                    own = [t.select(t.both(there, inside), x, zero) for x in values]
                    squares = gpu_fused.sum_squares(own, squares)
                gates = [gpu_fused.activated(plan.activation, gate) for gate in gates] if plan.activation else []
                for factors in (gates, scales):
                    values = [t.fmul(*pair) for pair in zip(values, factors, strict=True)] if factors else values
                with t.when(inside):
                    t.store_four([t.select(there, x, zero) for x in values], place)
            if plan.norm is not None:
                gpu_fused.store_of_warp(squares, self.place, self.squares(token))

    def squares(self, token: t.Int) -> t.Value:
        """Where the sums of squares of a token begin."""
        plan = self.plan
        first = 4 * plan.tiles * plan.chunk * plan.sums
        return t.at(self.sums, t.mul(token, 4 * plan.threads // WARP), first)

    def result(self) -> tuple[t.Value, t.Value, t.Value, t.Value]:
        """Of the sum that the thread writes in the end, if there is one: token and output of the tile, row and output of y."""
        rest, local = t.div(self.thread, OUTPUTS), t.rem(self.thread, OUTPUTS)
        tile, token = t.div(rest, self.plan.chunk), t.rem(rest, self.plan.chunk)
        output = t.add(self.first_output, t.mul(tile, OUTPUTS), local)
        return token, local, t.add(t.mul(self.chunk, self.plan.chunk), token), output

    def load_epilogue(self) -> dict[str, t.Value]:
        """The "scale" and the "residual" of that sum, if there are such."""
        _, _, row, output = self.result()
        row, output = t.least(row, self.plan.tokens - 1), t.least(output, t.sub(self.out, 1))
        places = {"scale": output} if self.plan.scale == "rows" else {}
        if "residual" in self.plan.dtypes:
            places["residual"] = t.add(t.mul(row, self.out), output)
        return {name: self.load_one(name, place) for name, place in places.items()}

    def load_one(self, name: str, place: t.Value) -> t.Value:
        """A value of one of the arrays that are given."""
        return t.load(t.at(self.given[name], t.mul(place, self.plan.size(name))), self.plan.dtypes[name])[0]

    def add_products(self, turn: int, word: t.Value, sums: list[t.Value]) -> list[t.Value]:
        """Adds the products of a word's entries with their groups, one sum per token."""
        plan, line = self.plan, self.line(turn)
        # The slot of the word's first code; those of the others differ from it in the lowest two bits.
        step = t.add(t.mul(t.rem(line, 2), LANES // 2), t.mul(self.word, 4))
        slot = t.add(t.mul(t.rem(t.div(line, 2), 2), LANES), t.xor(step, t.rem(self.output, LANES)))
        book, group = t.div(slot, plan.groups), t.rem(slot, plan.groups)
        group = t.add(t.mul(t.div(line, 4), plan.groups), group)
        size = plan.dimension * plan.size("books")
        entries = t.at(self.entries, t.mul(book, plan.entries * size))
        parts = [[t.number(0.0)] * plan.chunk for _ in range(4)]  # apart, lest every product waits for the one before
        for i, part in enumerate(parts):
            values = self.load_entry(t.at(entries, t.mul(t.permute(word, 0, 0x4440 | i), size)))
            inputs = t.at(self.inputs, t.mul(t.xor(group, i), 16))
            for token in range(plan.chunk):
                for quarter in range(plan.dimension // 4):
                    place = 16 * plan.room * (token * plan.dimension // 4 + quarter)
                    own = values[4 * quarter : 4 * quarter + 4]
                    for x, value in zip(t.load(t.at(inputs, place), jnp.float32, 4), own, strict=True):
                        part[token] = t.fma(x, value, part[token])
        return [t.fadd(old, gpu_fused.added(own)) for old, *own in zip(sums, *parts, strict=True)]

    def load_entry(self, address: t.Value) -> list[t.Value]:
        """The d values of an entry."""
        some = min(self.plan.dimension, PIECE // self.plan.size("books"))
        places = range(0, self.plan.dimension * self.plan.size("books"), some * self.plan.size("books"))
        return [value for place in places for value in t.load(t.at(address, place), self.plan.dtypes["books"], some)]

    def store_sums(self, sums: list[t.Value]) -> None:
        """Adds up the sums of the four threads of an output and puts them into shared memory, [tile, token, warp, output]."""
        plan = self.plan
        first = t.add(t.mul(self.tile, plan.chunk * plan.sums), t.mul(self.warp, OUTPUTS), self.local)
        mine = t.less(self.word, 1)
        if plan.threads > WARP * plan.warps * plan.tiles:
            mine = t.both(mine, t.less(self.tile, plan.tiles))
        for token, value in enumerate(sums):
            for distance in (OUTPUTS, 2 * OUTPUTS):
                value = t.fadd(value, t.shuffle(value, distance))
            with t.when(mine):
                t.store(value, t.at(self.sums, t.mul(first, 4), 4 * token * plan.sums))

    def finish(self, epilogue: Mapping[str, t.Value]) -> None:
        """Adds up the sums of the warps, scales them, adds the residual, and writes them."""
        plan, (token, local, row, output) = self.plan, self.result()
        inside = t.both(t.less(output, self.out), t.less(row, plan.tokens))
        with t.when(t.both(inside, t.less(self.thread, plan.tiles * plan.chunk * OUTPUTS))):
            first = t.add(t.mul(t.div(self.thread, OUTPUTS), plan.sums), local)
            sums = t.at(self.sums, t.mul(first, 4))
            value = gpu_fused.added([t.load(t.at(sums, 4 * OUTPUTS * w), jnp.float32)[0] for w in range(plan.warps)])
            value = t.fmul(value, epilogue["scale"]) if "scale" in epilogue else value
            if plan.norm is not None:
                squares = self.squares(token), plan.threads // WARP, plan.columns
                value = t.fmul(value, gpu_fused.norm_factor(*squares, plan.norm[0]))
            value = t.fadd(value, epilogue["residual"]) if "residual" in epilogue else value
            place = t.at(self.y, t.mul(t.add(t.mul(row, self.out), output), plan.size("y")))
            t.store(value, place, plan.dtypes["y"])


def _kernel(*refs, plan: Plan, outs: Sequence[int]):
    place = [lax.axis_index(name) for name in ("block", "chunk")]
    plgpu.griddepcontrol_launch_dependents()
    plgpu.griddepcontrol_wait()
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(scalar,) * 2 + (plgpu.RefType(),) * len(refs))
    def thread(_, block, chunk, *refs):
        block, chunk = (i.registers.item() for i in (block, chunk))
        addresses = list(map(t.pointer, refs))
        blocks = [plan.blocks(out) for out in outs]
        own, out, arrays, given = gpu_fused.place(block, outs, blocks, addresses[:-3], plan)
        ThreadProgram(plan, (own, chunk), out, (*arrays, *addresses[-3:]), given).run()

    thread(*place, *refs)


def gather_matmul(
    plan: Plan,
    x: jax.Array,
    weights: Sequence[Weight],
    prologue: Prologue | None = None,
    residual: jax.Array | None = None,
) -> list[jax.Array]:
    """Returns residual + prologue(x) @ W.T for several weights, each [tokens, out]; sums are always in the same order.

    Args:
      plan: for these arrays, of `make_plan`.
      x: float [tokens, in]; the time grows with the tokens.
      weights: of each, words uint32 [4 * sets, out, 4], see `layout.banked_words`; codebooks float [M, K * d], M of 1, 2, 4
        or 8 and d of 4, 8 or 16; scale float [out or 1, 1] or [1, in / d], or None.
      prologue: with a float array [in] or [tokens, in], or None.
      residual: float [tokens, out] of the only weight, or None.
    """
    outs = [words.shape[1] for words, _, _ in weights]
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, outs=outs),
        out_type=[jax.ShapeDtypeStruct((plan.tokens, out), plan.dtypes["y"]) for out in outs],
        grid=(sum(map(plan.blocks, outs)), -(-plan.tokens // plan.chunk)),
        grid_names=("block", "chunk"),
        num_threads=plan.threads // WARPGROUP,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((size,), jnp.float32) for size in plan.shared],
        kernel_name="gather_matmul",
    )
    return kernel(*gpu_fused.arrays(x, weights, prologue, residual))
