"""Caption scores: BLEU, METEOR, ROUGE-L and CIDEr-D with the scorers of pycocoevalcap.

The scorers are called one by one: COCOEvalCap always starts SPICE, which downloads. What the package leaves to the
reader is taken care of here: its tokenizer writes into its own folder (fails where it is installed read-only), its
METEOR waits for ever when java dies, and java reads text in the machine's encoding.

BLEU and CIDEr are scores of the whole set (CIDEr's word weights come from the references of this very set, and one
sample alone always scores 0), so captions are gathered first and scored once, never averaged over ranks. CIDEr is
given as the package gives it; papers print it times 100.

Without `java` METEOR is None and stands in "missing", and captions are split by a small tokenizer of our own;
"tokenizer" in the result says which one was used. "ptb" is the one that published figures use.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.scoring.bootstrap import Bootstrap, Interval

Key = TypeVar("Key", bound=Hashable)

# What the COCO tokenizer drops (pycocoevalcap/tokenizer/ptbtokenizer.py).
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
    + [f"-{bracket}-" for bracket in ("LRB", "RRB", "LCB", "RCB", "lrb", "rrb", "lcb", "rcb")]
)
# Clitics as the Penn Treebank splits them, numbers, words, and then any other single sign.
SIMPLE_TOKEN = re.compile(r"n't\b|'(?:s|m|d|ll|re|ve)\b|\d+(?:[.,:/]\d+)*|(?:(?!n't\b)[^\W_])+(?:-[^\W_]+)*|[^\w\s]|_")
JAVA_ENCODING = "-Dfile.encoding=UTF-8"
METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider", "meteor")


def java_command() -> str | None:
    """The path of `java`, or None where there is none on PATH."""
    return shutil.which("java")


def _java_environment() -> dict[str, str]:
    # METEOR writes numbers in the machine's locale; with a decimal comma its answers cannot be read.
    return {**os.environ, "LC_ALL": "C"}


def tokenize_ptb(captions: Sequence[str]) -> list[str]:
    """Captions as lower-case Penn Treebank tokens joined by blanks, without punctuation, as COCO's evaluation does it.

    Raises RuntimeError if java is missing or fails.
    """
    import pycocoevalcap.tokenizer.ptbtokenizer as ptb

    java = java_command()
    if java is None:
        raise RuntimeError("the PTB tokenizer needs java")
    if not captions:
        return []
    jar = Path(ptb.__file__).parent / ptb.STANFORD_CORENLP_3_4_1_JAR
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "captions.txt"
        # One caption per line: split() also removes the Unicode line ends that java would count as lines.
        text.write_text("\n".join(" ".join(caption.split()) for caption in captions) + "\n", encoding="utf-8")
        command = [java, JAVA_ENCODING, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8", str(text)]
        done = subprocess.run(command, cwd=folder, env=_java_environment(), capture_output=True, check=False)
    lines = done.stdout.decode("utf-8").split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):
        reason = done.stderr.decode("utf-8", "replace").strip()[-400:]
        raise RuntimeError(f"the PTB tokenizer gave {len(lines)} lines for {len(captions)} captions: {reason}")
    return [" ".join(token for token in line.split() if token not in PUNCTUATION) for line in lines]


def tokenize_simple(captions: Sequence[str]) -> list[str]:
    """The stand-in where java is missing: lower case, words, numbers and clitics apart, punctuation left out."""
    return [" ".join(t for t in SIMPLE_TOKEN.findall(c.lower()) if any(s.isalnum() for s in t)) for c in captions]


def _meteor(
    references: dict[Any, list[str]], candidates: dict[Any, list[str]], timeout: float, bootstrap: Bootstrap
) -> tuple[float, Interval | None]:
    """METEOR 1.5 of tokenised captions, and its interval.

    METEOR is a function of counts that add up over captions, so a replicate is scored as one caption that has the
    summed counts of those it drew.

    Raises RuntimeError if java is missing, dies, or has not finished after `timeout` seconds.
    """
    import pycocoevalcap.meteor.meteor as meteor

    java = java_command()
    if java is None:
        raise RuntimeError("METEOR needs java")

    class Meteor(meteor.Meteor):
        """The package's own protocol with java, on a process that we start and end."""

        def __init__(self) -> None:
            command = [java, "-Xmx2G", JAVA_ENCODING, "-jar", meteor.METEOR_JAR, "-", "-"]
            command += ["-stdio", "-l", "en", "-norm"]
            self.meteor_p = subprocess.Popen(
                command,
                cwd=Path(meteor.__file__).parent,
                env=_java_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # The package pipes this and never reads it: a talkative java would block.
                stderr=subprocess.DEVNULL,
            )
            self.lock = threading.Lock()

        def __del__(self) -> None:
            # The package's own waits for a lock that a failed compute_score() never gives back.
            pass

        def counts(self) -> list[list[float]]:
            """The counts of each caption, as java writes them."""
            return [[float(x) for x in self._stat(candidates[k][0], references[k]).split()] for k in candidates]

        def evaluate(self, counts: Sequence[Sequence[float]] | np.ndarray) -> list[float]:
            """The score of each row of counts, and last that of all rows together."""
            line = " ||| ".join(["EVAL", *(" ".join(map(repr, map(float, row))) for row in counts)])
            assert self.meteor_p.stdin is not None and self.meteor_p.stdout is not None
            self.meteor_p.stdin.write(f"{line}\n".encode())
            self.meteor_p.stdin.flush()
            return [float(self.meteor_p.stdout.readline()) for _ in range(len(counts) + 1)]

    scorer = Meteor()
    watch = threading.Timer(timeout, scorer.meteor_p.kill)
    watch.start()
    try:
        counts = scorer.counts()
        score = scorer.evaluate(counts)[-1]
        interval = bootstrap.interval(counts, lambda sums: np.array(scorer.evaluate(sums)[:-1]))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"METEOR's java process ended early ({type(error).__name__}: {error})") from None
    finally:
        watch.cancel()
        scorer.meteor_p.kill()
        scorer.meteor_p.communicate()
    return score, interval


def bleu_of_counts(sums_RK: np.ndarray) -> np.ndarray:
    """BLEU-1..4 [R,4] from rows of (candidate length, reference length, 4 x guessed, 4 x correct), as the package does
    it: a little is added so that nothing is divided by 0."""
    length, reference, guessed, correct = sums_RK[:, 0], sums_RK[:, 1], sums_RK[:, 2:6], sums_RK[:, 6:10]
    precisions = np.cumprod((correct + 1e-15) / (guessed + 1e-9), axis=1) ** (1 / np.arange(1, 5))
    ratio = (length + 1e-15) / (reference + 1e-9)
    return precisions * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)[:, None]


def _bleu_of_order(n: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: bleu_of_counts(sums)[:, n]


def _bleu_counts(references: Mapping[Key, list[str]], candidates: Mapping[Key, list[str]]) -> list[list[int]]:
    """`bleu_of_counts`' row of each caption; the reference that is closest in length counts."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for key, (candidate,) in candidates.items():
        scorer += (candidate, references[key])
    rows = []
    for found in scorer.ctest:
        closest = min((abs(length - found["testlen"]), length) for length in found["reflen"])[1]
        rows.append([found["testlen"], closest, *found["guess"], *found["correct"]])
    return rows


def _tokenize_all(
    references: Mapping[Key, Sequence[str]], candidates: Mapping[Key, str], tokenizer: str
) -> tuple[dict[Key, list[str]], dict[Key, list[str]]]:
    """References and candidates of each key, tokenised in one go and without METEOR's separator."""
    flat = [text for key in candidates for text in (candidates[key], *references[key])]
    if tokenizer != "none":
        flat = tokenize_ptb(flat) if tokenizer == "ptb" else tokenize_simple(flat)
    tokens = iter(text.replace("|||", " ") for text in flat)
    hypotheses: dict[Key, list[str]] = {}
    truths: dict[Key, list[str]] = {}
    for key in candidates:
        hypotheses[key] = [next(tokens)]
        truths[key] = [next(tokens) for _ in references[key]]
    return truths, hypotheses


def score_captions(
    references: Mapping[Key, Sequence[str]],
    candidates: Mapping[Key, str],
    *,
    tokenizer: str = "auto",
    meteor_timeout: float = 600.0,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """Score one candidate caption per picture against its references.

    references: per picture at least one caption; candidates: one per picture, the same pictures.
    tokenizer: "ptb", "simple", "none" (texts are tokens joined by blanks), or "auto": ptb where java is, else simple.
    meteor_timeout: seconds after which METEOR is given up.
    bootstrap: for intervals over pictures; none without it. CIDEr's keep the word weights of the whole set.

    Returns bleu1 ... bleu4, rouge_l, meteor in [0,1], cider in [0,10], "samples", "tokenizer", "bleu_counts" (testlen,
    reflen, guess, correct), "intervals" by score, and "missing": a dict of what could not be computed and why. The
    scores are None for an empty set.
    Raises ValueError where pictures do not agree or have no reference.
    """
    if tokenizer not in ("auto", "ptb", "simple", "none"):
        raise ValueError(f"tokenizer is {tokenizer!r}; choose auto, ptb, simple or none")
    if references.keys() != candidates.keys():
        odd = sorted(map(str, references.keys() ^ candidates.keys()))
        raise ValueError(f"{len(odd)} pictures have only references or only a candidate, e.g. {odd[:3]}")
    bare = [str(key) for key, texts in references.items() if not texts]
    if bare:
        raise ValueError(f"{len(bare)} pictures have no reference caption, e.g. {bare[:3]}")
    if tokenizer == "auto":
        tokenizer = "ptb" if java_command() else "simple"
    result: dict[str, Any] = dict.fromkeys(METRICS)
    missing: dict[str, str] = {}
    result.update(samples=len(candidates), tokenizer=tokenizer, missing=missing, intervals={})
    if not candidates:
        missing.update(dict.fromkeys(METRICS, "no captions"))
        return result

    # Only here, so that the masks and pictures can be scored where the eval extra is not installed.
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bootstrap = bootstrap or Bootstrap(replicates=0)
    intervals: dict[str, Interval | None] = {}
    truths, hypotheses = _tokenize_all(references, candidates, tokenizer)
    counts = np.array(_bleu_counts(truths, hypotheses))
    total = counts.sum(axis=0)
    for n, value in enumerate(bleu_of_counts(total[None])[0]):
        result[f"bleu{n + 1}"] = float(value)
        intervals[f"bleu{n + 1}"] = bootstrap.interval(counts, _bleu_of_order(n))
    testlen, reflen, *more = total.tolist()
    result["bleu_counts"] = {"testlen": testlen, "reflen": reflen, "guess": more[:4], "correct": more[4:]}
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        each = np.asarray(scorer.compute_score(truths, hypotheses)[1], dtype=np.float64)
        # fsum is exact: the mean does not depend on the captions' order.
        result[name] = math.fsum(each) / len(each)
        intervals[name] = bootstrap.of_mean(each)
    try:
        result["meteor"], intervals["meteor"] = _meteor(truths, hypotheses, meteor_timeout, bootstrap)
    except RuntimeError as error:
        missing["meteor"] = str(error)
        warnings.warn(f"METEOR is missing from the caption scores: {error}", stacklevel=2)
    result["intervals"] = intervals
    return result
