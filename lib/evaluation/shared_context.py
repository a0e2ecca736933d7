"""lm-eval's Hugging Face model, reading what several choices have in common once.

A multiple-choice question asks for the likelihood of each choice after the same context, and lm-eval's model reads the
context again for every choice. Here it is read once, and its keys and values serve all choices; the scores are the same.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM

from lib.evaluation.perplexity import before_head, head_inputs

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, ids of the context, ids of the continuation


class SharedContextLM(HFLM):
    """`HFLM` of a causal model, without progress bars, and with less to compute where several continuations follow a context."""

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the log-likelihood in nats of its continuation, and whether greedy decoding would give it."""
        answers = {}
        for places in shared_batches(requests, self.max_length, self.batch_size):
            answers |= zip(places, self._scores([requests[place] for place in places]), strict=True)
        rest = [place for place in range(len(requests)) if place not in answers]
        plain = super()._loglikelihood_tokens([requests[place] for place in rest], disable_tqdm, override_bs) if rest else []
        answers |= zip(rest, plain, strict=True)
        return [answers[place] for place in range(len(requests))]

    @torch.no_grad()
    def _scores(self, requests: list[Request]) -> list[tuple[float, bool]]:
        """The same in two forward passes: the first reads contexts up to the length of the shortest, the second all the rest.

        So the first pass has rows of one length, and no key in the cache is padding; no token attends to the padding of the
        second pass, which is on the right. The last id of a context belongs to the second pass, because it predicts the first
        of the continuation. The head reads only the positions that predict a continuation.
        """
        # 1. Every distinct beginning once; each request gets its keys and values.
        first = min(len(context) for _, context, _ in requests) - 1
        begins = [tuple(context[:first]) for _, context, _ in requests]
        distinct = list(dict.fromkeys(begins))
        output, hidden = before_head(self.model, input_ids=torch.tensor(distinct, device=self.device), use_cache=True)
        cache = output.past_key_values
        cache.batch_select_indices(torch.tensor([distinct.index(begin) for begin in begins]))  # may lie on several devices
        # 2. The rest of each request, and the logits that predict its continuation.
        rows = [torch.tensor((context + continuation)[first:-1]) for _, context, continuation in requests]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        rest = dict(input_ids=padded, past_key_values=cache, use_cache=True)
        lengths = [len(continuation) for _, _, continuation in requests]
        predicting = [slice(len(row) - length, len(row)) for row, length in zip(rows, lengths, strict=True)]
        if hidden is None:
            logits = self.model(**rest).logits
            scored = [row[own] for row, own in zip(logits, predicting, strict=True)]
        else:
            _, hidden = head_inputs(self.model, **rest)
            joined = torch.cat([row[own] for row, own in zip(hidden, predicting, strict=True)])
            scored = self.model.get_output_embeddings()(joined).split(lengths)
        # 3. Likelihoods.
        answers = []
        for own, (_, _, continuation) in zip(scored, requests, strict=True):
            scores = F.log_softmax(own, dim=-1, dtype=self.softmax_dtype)
            target = torch.tensor(continuation, device=scores.device)
            greedy = torch.equal(scores.argmax(-1), target)
            answers.append((scores.gather(1, target[:, None]).sum().item(), greedy))
        return answers


def shared_batches(requests: list[Request], longest: int, batch: int) -> list[list[int]]:
    """Places of the requests that gain by sharing: whole questions in batches of at most `batch`, sorted by the context's length.

    The rest is left to lm-eval's model: contexts of one token (a choice scored alone), with a single continuation or only
    continuations of one token, which it reads once itself, and requests longer than `longest` positions.
    """
    questions: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, (_, context, continuation) in enumerate(requests):
        if len(context) > 1 and len(context) + len(continuation) <= longest + 1:
            questions[tuple(context)].append(place)
    batches: list[list[int]] = []
    for context in sorted(questions, key=len):
        places = questions[context]
        if max(len(requests[place][2]) for place in places) == 1:
            continue
        parts = [places[start : start + batch] for start in range(0, len(places), batch)]
        for part in [part for part in parts if len(part) > 1]:
            if batches and len(batches[-1]) + len(part) <= batch:
                batches[-1] += part
            else:
                batches.append(part)
    return batches
