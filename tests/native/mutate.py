"""Plants one error at a time in the CUDA kernels and runs their tests: ``python tests/native/mutate.py [NAME …]``.

An error that no test notices is printed, and the exit code is 1. All of them take a quarter of an hour; a
NAME is part of a file's name, such as ``relevance``.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import emulated
import ops_tests

from maskcf_fast.ops import building

# File, what is written there (once), what is put in its place.
MUTATIONS: list[tuple[str, str, str]] = [
    # select: a block per image
    ("select.cuh", "bad |= !is_finite(cam[p]);", "bad |= false;"),
    ("select.cuh", "rule.usable = !__syncthreads_or(bad);", "rule.usable = !bad;"),
    ("select.cuh", "for (int lane = 16; lane > 0; lane /= 2)", "for (int lane = 8; lane > 0; lane /= 2)"),
    ("select.cuh", "maxima[thread / 32] = rule.maximum;\n    __syncthreads();", "maxima[thread / 32] = rule.maximum;"),
    ("select.cuh", "if (!rule.usable) rule.maximum = T(0);", ""),
    ("select.cuh", "done = s.k == 0;\n  }\n  __syncthreads();", "done = s.k == 0;\n  }"),
    ("select.cuh", "histogram[thread] = 0;\n    __syncthreads();", "histogram[thread] = 0;"),
    ("select.cuh", "if (thread == 0) done = narrow(histogram, place, cut, k);\n    __syncthreads();",
     "if (thread == 0) done = narrow(histogram, place, cut, k);"),
    ("select.cuh", "if (thread < kBins) histogram[thread] = 0;",
     "if (place == 0 && thread < kBins) histogram[thread] = 0;"),
    ("select.cuh", "int64_t(blockIdx.x) * patches;", "int64_t(blockIdx.x) * (patches - 1);"),
    ("select.cu", "blocks(cam.size(0)), 256", "blocks(cam.size(0)), 16"),
    # refill
    ("refill.cuh", "const int64_t p = row * grid.cols + col;", "const int64_t p = row * grid.rows + col;"),
    ("refill.cuh", "if (blockIdx.y == 0) mask.keep", "if (blockIdx.y == 1) mask.keep"),
    ("refill.cuh", "}\n  __syncthreads();\n\n  const int first", "}\n\n  const int first"),
    ("refill.cuh", "all - first < args.lines ? all - first : args.lines", "args.lines"),
    ("refill.cuh", "if (source[col] == image) continue;", "continue;"),
    ("refill.cuh", "col * run < begin + kBytes; ++col", "col * run < begin + kBytes - 1; ++col"),
    ("refill.cuh", "int(col * run - begin)", "int(col * run - begin) + 1"),
    ("refill.cuh", "const int kept = bytes - i * kSize;", "const int kept = bytes;"),
    ("refill.cuh", "image = source[col];\n          replace_tail", "replace_tail"),
    ("refill.cu", "access_bytes({grid.line_bytes(), addresses})", "access_bytes({grid.line_bytes()})"),
    ("refill.cu", "size_t(grid.cols) * sizeof(int64_t)", "size_t(grid.cols) * sizeof(int32_t)"),
    # gather and its gradient
    ("gather.cuh", "if (t < prefix) return n;", ""),
    ("gather.cuh", "patches = tokens - prefix, p = t - prefix;", "patches = tokens, p = t - prefix;"),
    ("gather.cuh", "start < width; start += 32 * kInFlight", "start < width; start += 32 * kInFlight + 32"),
    ("gather.cuh", "if (start + 32 * i < width) to[", "if (start + 32 * i < width - 1) to["),
    ("gather.cuh", "blockIdx.x)));\n  }\n  __syncthreads();", "blockIdx.x)));\n  }"),
    ("gather.cuh", "head[offset + i] = first < n ? first : -1;", "head[offset + i] = first;"),
    ("gather.cuh", "int after = i + 1;", "int after = i + 2;"),
    ("gather.cuh", "const int64_t first = stays ? n : head[offset + n];", "const int64_t first = n;"),
    ("gather.cuh", "offset = (t - args.prefix) * args.images;", "offset = (t - 1) * args.images;"),
    ("gather.cuh", "using W = typename Wide<T>::type;", "using W = T;"),
    ("gather.cu", "width % kWide == 0 && ", ""),
    ("gather.cu", "access_bytes({row, address_of(tokens), address_of(out)})", "access_bytes({row})"),
    # patchify
    ("patchify.cuh", "i < args.channels * 256;", "i < args.channels * 255;"),
    ("patchify.cuh", "args.std[i / 256]);\n    }\n    __syncthreads();", "args.std[i / 256]);\n    }"),
    ("patchify.cuh", "left < args.group ? left : args.group", "args.group"),
    ("patchify.cuh", "y = at % area / side", "y = at / side"),
    ("patchify.cuh", "p % cols * this->p", "p % cols"),
    ("patchify.cuh", "from = args.place(n, ++p);", "from = args.place(n, p);"),
    ("patchify.cuh", "      c = 0;\n", ""),
    ("patchify.cuh", "args.mean[c], args.std[c]", "args.mean[c], args.std[0]"),
    ("patchify.cu", "patches * row % kWide == 0 && ", ""),
    ("patchify.cu", "kWide / std::gcd(row, kWide)", "1"),
    # relevance
    ("relevance.cuh", "if (row < count && x < d) pack", "if (row < count) pack"),
    ("relevance.cuh", "pair_at(a, at.row(1) * stride + x + two),\n", "pair_at(a, at.row(0) * stride + x + two),\n"),
    ("relevance.cuh", "{pair_at(b, row), pair_at(b, row + 8)}", "{pair_at(b, row + 8), pair_at(b, row)}"),
    ("relevance.cuh", "warp * 16 + lane / 4 + 8 * i", "warp * 16 + lane / 4 + 4 * i"),
    ("relevance.cuh", "c[j][2 + e] += lower.value[i]", "c[j][2 + e] += upper.value[i]"),
    ("relevance.cuh", "key += kTile) {\n    __syncthreads();", "key += kTile) {"),
    ("relevance.cuh", "args.t - key, args.d,\n                         args.stride, k);\n    __syncthreads();",
     "args.t - key, args.d,\n                         args.stride, k);"),
    ("relevance.cuh", "if (key + at.col(j, e) < args.t && logit > higher)", "if (logit > higher)"),
    ("relevance.cuh", "if (key + at.col(j, e) < args.t) sum[i] +=", "sum[i] +="),
    ("relevance.cuh", "sum[i] *= expf(most[i] - higher);", ""),
    ("relevance.cuh", "lane <= 2; lane *= 2", "lane < 2; lane *= 2"),
    ("relevance.cuh", "if (query >= args.tq) continue;", "if (query > args.tq) continue;"),
    ("relevance.cuh", "(a < 0.0f ? 0.0f : a) * weight;  // a NaN stays one", "(a > 0.0f ? a : 0.0f) * weight;"),
    ("relevance.cuh", "first < args.tq; first += kTile) {\n    __syncthreads();", "first < args.tq; first += kTile) {"),
    ("relevance.cuh", "for (int lane = 4; lane < 32;", "for (int lane = 4; lane < 16;"),
    ("relevance.cuh", "sums[at.warp][at.col(j, e)] = columns[j][e];\n    }\n  }\n  __syncthreads();",
     "sums[at.warp][at.col(j, e)] = columns[j][e];\n    }\n  }"),
    ("relevance.cuh", "(sums[2][column] + sums[3][column])", "(sums[2][column] + sums[2][column])"),
    ("relevance.cuh", "g[i] = float(args.g[n * args.gs.n + h * args.gs.h + i]);\n  }\n  __syncthreads();",
     "g[i] = float(args.g[n * args.gs.n + h * args.gs.h + i]);\n  }"),
    ("relevance.cuh", "if (lane == 0) shared[0][warp] = most;\n  __syncthreads();",
     "if (lane == 0) shared[0][warp] = most;"),
    ("relevance.cuh", "if (lane == 0) shared[1][warp] = sum;\n  __syncthreads();",
     "if (lane == 0) shared[1][warp] = sum;"),
    ("relevance.cuh", "sum / float(heads)", "sum * (1.0f / float(heads + 1))"),
    ("relevance.cuh", "i / t * heads * t + i % t", "i / t * t + i % t"),
    ("relevance.cu", "4 * tile, args", "3 * tile, args"),
    ("relevance.cu", "is_wide(q) && is_wide(k)", "is_wide(k)"),
    ("relevance.cu", "(args.t + kTile - 1) / kTile", "args.t / kTile"),
]  # fmt: skip


def tests_of(file: str) -> str:
    """Those of the op that the file is about."""
    op = Path(file).stem
    return f"({'mask' if op == 'select' else op} or {op}) and {emulated.SELECT}"


def noticed(source: Path, objects: Path, file: str) -> str | None:
    """How the tests notice what is in ``source``; None if they do not."""
    with tempfile.TemporaryDirectory() as folder:
        mutated = Path(folder) / "objects"
        shutil.copytree(objects, mutated)
        names = [f"{Path(file).stem}.cu", *(["refill.cu"] if file == "select.cuh" else [])]
        try:
            library = emulated.build(Path(folder), source, mutated, names)
        except building.BuildError as error:
            raise SystemExit(f"a mutation must compile:\n{error}") from None
        for order in ("forward", "reverse", "random"):
            done = ops_tests.run(sys.executable, library, tests_of(file), "tests/ops/test_generated.py",
                                 MASKCF_EMULATOR_ORDER=order)  # fmt: skip
            if done.returncode:
                lines = [
                    line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("FAILED", "E  "))
                ]
                return f"{order}: {lines[-1] if lines else 'the process ended'}"
    return None


def main() -> int:
    """Print what became of every mutation."""
    chosen = [m for m in MUTATIONS if len(sys.argv) == 1 or any(name in m[0] for name in sys.argv[1:])]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        objects = Path(folder) / "objects"
        emulated.build(Path(folder) / "library", None, objects)
        for file, old, new in chosen:
            source = Path(folder) / "csrc"
            shutil.copytree(building.source_folder(), source, dirs_exist_ok=True)
            text = (source / file).read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{file} holds this {text.count(old)} times, not once: {old!r}")
            (source / file).write_text(text.replace(old, new))
            how = noticed(source, objects, file)
            missed += how is None
            print(
                f"{'noticed' if how else 'MISSED '} {file}: {old.strip()!r} -> {new.strip()!r}\n    {how}", flush=True
            )
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
