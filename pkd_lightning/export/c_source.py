"""An ensemble as one C99 file: weights included, static memory, no library but libm."""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.export.c_layers import BlockShape, Buffers, Student, array, number, padded
from pkd_lightning.export.facts import Facts, Job
from pkd_lightning.models.classifier import as_image
from pkd_lightning.rounding import Weights
from pkd_lightning.tasks import Classification

RUNTIME = Path(__file__).parent / "runtime.c"
BITS: dict[Weights, int] = {"float32": 32, "bf16": 16, "int8": 8}  # of a weight

HEAD = """\
/* {name}: {members} students, distilled in rounds; each prefix of them is a model. Written by pkd export.

{table}

   Build:   cc -std=c99 -O3 -march=native -c {file}.c    and link with -lm
   Try:     cc -std=c99 -O3 -march=native -DPKD_MAIN {file}.c -lm -o {file}
            ./{file} {members} < inputs.raw    prints a line for each input: the label, then the logits

       float logits[PKD_CLASSES];
       int predicted = pkd_predict(input, PKD_MEMBERS, logits);    of pkd_labels[predicted]

   pkd_predict takes one input, {input}, unprepared,
   and the number of students to use, 1 to PKD_MEMBERS. It writes PKD_CLASSES logits, unless `logits` is NULL. It
   returns the index of the largest one, from 0, or -1 where there is no such prefix. pkd_macs gives the
   multiply-accumulates of a prefix, or -1. pkd_classes has the names of the classes, in UTF-8, or their labels.

   {weights}

   All memory is static, {memory} bytes besides the weights: two threads must not call pkd_predict at once.

   Made with {versions}. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PKD_NAME {quoted}
#define PKD_MEMBERS {members}
#define PKD_CLASSES {classes}
#define PKD_CHANNELS {channels}
#define PKD_HEIGHT {height}
#define PKD_WIDTH {width}
#define PKD_WEIGHTS {bits} /* bits of a weight */

typedef {type} pkd_value;

int pkd_predict(const pkd_value *input, int members, float *logits);
long long pkd_macs(int members);

/* the label in the data set of each output */
extern const int pkd_labels[PKD_CLASSES];
const int pkd_labels[PKD_CLASSES] = {{{labels}}};

/* its name, or the label where the data set names none */
extern const char *const pkd_classes[PKD_CLASSES];
const char *const pkd_classes[PKD_CLASSES] = {{
    {classes_named}}};
"""

FOOT = """\
/* Logits of the students, each added to those of the prefix before: F_t = a_t * F_(t-1) + c_t * f_t. */
static void (*const pkd_students[PKD_MEMBERS])(void) = {{{students}}};
static const float pkd_scales[PKD_MEMBERS][2] = {{{scales}}};
static const long long pkd_costs[PKD_MEMBERS] = {{{macs}}};

long long pkd_macs(int members)
{{
    return members < 1 || members > PKD_MEMBERS ? -1 : pkd_costs[members - 1];
}}

int pkd_predict(const pkd_value *input, int members, float *logits)
{{
    float mixed[PKD_CLASSES];
    int c, i, t, largest = 0;
    if (members < 1 || members > PKD_MEMBERS)
        return -1;
    for (c = 0; c < PKD_CHANNELS; c++)
        for (i = 0; i < PKD_HEIGHT * PKD_WIDTH; i++)
            pkd_image[i * PKD_CHANNELS + c] =
                (float)input[c * PKD_HEIGHT * PKD_WIDTH + i] * pkd_scale[c] + pkd_shift[c];
    for (i = 0; i < PKD_CLASSES; i++)
        mixed[i] = 0.0f;
    for (t = 0; t < members; t++) {{
        pkd_students[t]();
        for (i = 0; i < PKD_CLASSES; i++)
            mixed[i] = (t ? pkd_scales[t][0] * mixed[i] : 0.0f) + pkd_scales[t][1] * pkd_student[i];
    }}
    for (i = 1; i < PKD_CLASSES; i++)
        if (mixed[i] > mixed[largest])
            largest = i;
    if (logits)
        memcpy(logits, mixed, sizeof mixed);
    return largest;
}}

#ifdef PKD_MAIN
#include <stdio.h>
#include <stdlib.h>

int main(int count, char **arguments)
{{
    static pkd_value input[PKD_CHANNELS * PKD_HEIGHT * PKD_WIDTH];
    float logits[PKD_CLASSES];
    int i, predicted, members = count > 1 ? atoi(arguments[1]) : PKD_MEMBERS;
    while (fread(input, sizeof input, 1, stdin) == 1) {{
        predicted = pkd_predict(input, members, logits);
        if (predicted < 0) {{
            fprintf(stderr, "%d students: there are prefixes of 1 to %d\\n", members, PKD_MEMBERS);
            return 1;
        }}
        printf("%d", pkd_labels[predicted]);
        for (i = 0; i < PKD_CLASSES; i++)
            printf(" %.9g", logits[i]);
        printf("\\n");
    }}
    return 0;
}}
#endif
"""


def c_source(ensemble: ProgressiveEnsemble, facts: Facts, file: str = "ensemble") -> str:
    """The C file of an ensemble; `file` is its name without ending.

    Raises:
        ConfigError: where a member or the task has no C form, naming it.
    """
    task = ensemble.task
    if not isinstance(task, Classification) or type(task).prepare is not Classification.prepare:
        raise ConfigError(
            [f"task {type(task).__qualname__}: --format c knows how Classification prepares inputs, and no other way"]
        )
    channels, height, width = as_image(task.input_shape)
    students = [
        Student(member, t + 1, task.input_shape, task.num_classes, facts.weights)
        for t, member in enumerate(ensemble.members)
    ]
    buffers = Buffers({"image": channels * height * width, "student": padded(task.num_classes)})
    for student in students:
        buffers.need(**student.buffers.sizes)
    shapes = list(dict.fromkeys(shape for student in students for shape, _ in student.blocks))
    scale, shift = task.scale_and_shift
    parts = [
        _head(facts, file, (channels, height, width), 4 * sum(buffers.sizes.values())),
        "\n".join(
            [
                "/* working memory */",
                *(f"static float pkd_{name}[{size}];" for name, size in buffers.sizes.items()),
                *(f"static float pkd_{name}[1];" for name in ("windows",) if name not in buffers.sizes),
                array("pkd_scale", scale.flatten()),
                array("pkd_shift", shift.flatten()),
            ]
        ),
        RUNTIME.read_text(encoding="utf-8").rstrip(),
        _title("blocks, each compiled for its sizes"),
        *(_block_function(i, shape) for i, shape in enumerate(shapes)),
    ]
    for student, params in zip(students, facts.params, strict=True):
        parts += [
            _title(f"student {student.place}: {params:,} parameters"),
            "\n".join(student.declarations()),
            _student_function(student, shapes),
        ]
    parts += [_title("ensemble"), _foot(ensemble, facts)]
    return "\n\n".join(parts)


def _head(facts: Facts, file: str, shape: tuple[int, int, int], memory: int) -> str:
    table = ["   students   parameters   multiply-accumulates"]
    for t, (params, macs) in enumerate(zip(accumulate(facts.params), facts.macs, strict=True)):
        table.append(f"   {t + 1:8}   {params:10,}   {macs:20,}")
    kind = "uint8_t" if facts.input_type == "uint8" else "float"
    return HEAD.format(
        name=_comment(facts.name),
        quoted=literal(facts.name),
        members=facts.members,
        table="\n".join(table),
        file=_comment(file),
        input=f"{' * '.join(map(str, facts.input_shape))} values of {kind} plane by plane",
        memory=f"{memory:,}",
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        classes=len(facts.labels),
        channels=shape[0],
        height=shape[1],
        width=shape[2],
        type=kind,
        labels=", ".join(map(str, facts.labels)),
        classes_named=",\n    ".join(literal(name) for name in facts.classes or map(str, facts.labels)),
        weights="Weights are float32."
        if facts.weights == "float32"
        else f"Weights of linear layers and convolutions were rounded to {facts.weights}.",
        bits=BITS[facts.weights],
    )


def _foot(ensemble: ProgressiveEnsemble, facts: Facts) -> str:
    return FOOT.format(
        students=", ".join(f"pkd_student_{t + 1}" for t in range(facts.members)),
        scales=", ".join(f"{{{number(float(a))}, {number(float(c))}}}" for a, c in ensemble.scales),
        macs=", ".join(map(str, facts.macs)),
    )


def literal(text: str) -> str:
    """A text as a C string of ASCII characters, which holds it in UTF-8."""

    def escaped(byte: int) -> str:
        if chr(byte) in '"\\?':  # two question marks could begin a trigraph
            return f"\\{chr(byte)}"
        return chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}"  # octal: a digit after three is no part of it

    return f'"{"".join(map(escaped, text.encode("utf-8", "replace")))}"'


def _comment(text: str) -> str:
    """A text in a comment, on its line: nothing in it begins or ends one."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown.replace("*/", "* /").replace("/*", "/ *")


def _title(text: str) -> str:
    return f"/* {'-' * max(8, 110 - len(text))} {text} */"


def _block_function(index: int, shape: BlockShape) -> str:
    return (
        f"static void pkd_block_{index}(const pkd_block *w, float *tokens, int by_columns, int backwards)\n{{\n"
        f"    pkd_mamba(w, tokens, {shape.rows}, {shape.columns}, by_columns, backwards, {shape.arguments()});\n}}"
    )


def _student_function(student: Student, shapes: list[BlockShape]) -> str:
    def lines() -> Iterator[str]:
        blocks = iter(student.blocks)
        for statement in student.statements:
            if statement.startswith("BLOCK"):
                shape, arguments = next(blocks)
                statement = f"pkd_block_{shapes.index(shape)}({arguments});"
            yield f"    {statement}"

    body = "\n".join(lines())
    return f"static void pkd_student_{student.place}(void)\n{{\n    int t;\n{body}\n}}"


def write(job: Job, path: Path) -> None:
    """Write the file; for errors see `c_source`."""
    path.write_text(c_source(job.ensemble, job.facts, job.path.stem), encoding="utf-8")


@contextmanager
def opened(path: Path, job: Job) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """The file as a function of raw inputs and a number of members; for errors see `loaded`."""
    with loaded(path, job.path) as predict:

        def call(inputs: Tensor, members: int) -> Tensor:
            inputs = inputs.contiguous()
            logits = torch.empty(len(inputs), len(job.facts.labels))
            for one, row in zip(inputs, logits, strict=True):
                predicted = predict(one.data_ptr(), members, row.data_ptr())
                if predicted != int(row.argmax()):
                    raise RunError(f"{job.path}: for {members} students pkd_predict returns {predicted}")
            return logits

        yield call


@contextmanager
def loaded(path: Path, name: Path, flags: Sequence[str] = ("-O1",)) -> Iterator[Callable[..., int]]:
    """`pkd_predict` of a file, compiled with the system's compiler and loaded into this process.

    Args:
        path: the file.
        name: what it is called in messages.
        flags: for the compiler, besides those of the language.

    Raises:
        RunError: where the compiler refuses it, or warns.
    """
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", *flags, "-shared", "-fPIC", "-x", "c"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ensemble.so"
        done = subprocess.run(
            [*command, str(path), "-o", str(library), "-lm"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RunError(f"{name}: the C compiler refuses it:\n{done.stderr.strip()[:2000]}")
        predict = ctypes.CDLL(str(library)).pkd_predict
        predict.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        yield predict
