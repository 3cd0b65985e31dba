"""Numbers about answers that a person can judge by: do they end, do they repeat themselves.
In: a model and prompts as ids. Out: shares between 0 and 1, over greedy answers.
Next: nanomind/exam.py
"""

import numpy as np

from nanomind.generate import Sampling, generate

GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0)


def answers(model, prompts, max_new_tokens, stop, sampling=GREEDY, batch=32, features=None):
    """Answers to many prompts, lists of ids, written `batch` at a time, longest prompts together. features: of each prompt's pictures, (m, P, E) or
    None. -> list of (ids, ended by itself)."""
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None] * len(prompts)
    for at in range(0, len(order), batch):
        rows = order[at:at + batch]
        written, ended = [[] for _ in rows], [False] * len(rows)
        steps = 0
        for new in generate(model, [prompts[i] for i in rows], max_new_tokens, stop, sampling, features and [features[i] for i in rows]):
            steps += 1
            for row, token in enumerate(new):
                if token is None:
                    ended[row] = True
                else:
                    written[row].append(token)
        longest = max(len(prompts[i]) + (0 if not features or features[i] is None else len(features[i]) * (features[i].size(1) - 1)) for i in rows)
        room = min(max_new_tokens, model.config.max_position_embeddings - longest)
        for row, i in enumerate(rows):  # when all rows have ended, `generate` stops without saying so
            found[i] = written[row], ended[row] or steps < room
    return found


def questions(rows, count):
    """Prompts of `count` documents spread over PackedTokens with a mask: everything before the first target; running text among them asks nothing.
    -> (lists of ids, features of the pictures in each, (m, P, E) or None). Each prompt once: of a preference pair both documents begin with it, and
    asked twice it would halve the share of different n-grams."""
    split, prompts, features = rows.split, [], []
    for document in np.linspace(0, len(split) - 1, min(count, len(split))).astype(int):
        first, last = int(split.starts[document]), int(split.starts[document] + split.lengths[document])
        marked = np.flatnonzero(split.mask[first:last])
        prompt = np.asarray(split.tokens[first:first + marked[0]]).tolist() if len(marked) and marked[0] > 1 else None
        numbers = rows.pictures(first, first + marked[0])[1] if prompt and rows.features is not None else ()
        if prompt and (prompt not in prompts or len(numbers)):
            prompts.append(prompt)
            features.append(rows.features[numbers] if len(numbers) else None)
    return prompts, features


def distinct(texts, n):
    """Share of different n-grams among all n-grams (distinct-n, arXiv:1510.03055). texts: lists of ids."""
    grams = [tuple(text[i:i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(texts, n=4):
    """Share of n-grams that have occurred before in the same text."""
    counts = [(len(text) - n + 1, len({tuple(text[i:i + n]) for i in range(len(text) - n + 1)})) for text in texts if len(text) >= n]
    total = sum(all_ for all_, _ in counts)
    return sum(all_ - different for all_, different in counts) / total if total else 0.0


def judge(model, tokenizer, rows, count=64, max_new_tokens=128):
    """Greedy answers to held-out questions -> {"ended", "distinct_2", "repeated_4", "answer_tokens"}. rows: PackedTokens with a mask."""
    limit = model.config.max_position_embeddings - max_new_tokens
    asked = [(prompt, own) for prompt, own in zip(*questions(rows, count)) if len(prompt) + (0 if own is None else own[..., 0].numel()) <= limit]
    stop = {tokenizer.end_of_text, tokenizer.im_end} - {None}
    found = answers(model, [prompt for prompt, _ in asked], max_new_tokens, stop, features=[own for _, own in asked]) if asked else []
    texts = [ids for ids, _ in found]
    return {"ended": sum(ended for _, ended in found) / max(1, len(found)), "distinct_2": distinct(texts, 2), "repeated_4": repetition(texts),
            "answer_tokens": sum(map(len, texts)) / max(1, len(texts))}
