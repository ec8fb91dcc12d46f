"""How the conditions were chosen is read from the samples; strata have two samples or more."""

import numpy as np
import torch

from ditbench.eval.design import INDEPENDENT, design_of, with_company
from ditbench.harness.samples.samples import Prompt, Samples


def labelled(*labels):
    return Samples(torch.zeros(len(labels), 2, 2, 3, dtype=torch.uint8), torch.tensor(labels))


def told(*texts):
    return Samples(torch.zeros(len(texts), 2, 2, 3, dtype=torch.uint8), prompts=tuple(Prompt(text) for text in texts))


def test_labels_in_turn_are_balanced_and_their_strata_are_the_labels():
    design = design_of(labelled(3, 5, 7, 3, 5, 7, 3, 5))
    assert design.name == "balanced labels (3 in turn)"
    assert design.strata_N.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_labels_that_were_drawn_are_independent():
    design = design_of(labelled(3, 5, 5, 7, 3, 7, 3, 5))
    assert design.name == INDEPENDENT and not design.strata_N.any()


def test_one_label_or_none_says_nothing_of_a_design():
    bare = Samples(torch.zeros(4, 2, 2, 3, dtype=torch.uint8))
    assert design_of(labelled(4, 4, 4)).name == design_of(bare).name == INDEPENDENT


def test_a_prompt_file_gone_through_twice_is_balanced_and_prompts_once_each_are_one_stratum():
    twice, once = design_of(told("a", "b", "a", "b")), design_of(told("a", "b", "c"))
    assert twice.name == "balanced prompts (2 in turn)" and twice.strata_N.tolist() == [0, 1, 0, 1]
    assert once.name == "prompts once each" and not once.strata_N.any()


def test_conditions_with_one_sample_each_share_a_stratum():
    design = design_of(labelled(0, 1, 2, 3, 0, 1))
    assert design.strata_N.tolist() == [0, 1, 2, 2, 0, 1]
    assert with_company(np.array([0, 0, 1, 1, 1, 2])).tolist() == [0, 0, 1, 1, 1, 0]
    assert with_company(np.array([4])).tolist() == [0] and with_company(np.array([1, 2, 3])).tolist() == [0, 0, 0]
