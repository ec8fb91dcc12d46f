"""Adjacent clustering of denoising steps (HTG, Alg. 1)."""

import pytest
import torch

from ditbench.harness.quant.clustering import adjacent_clusters, group_means


def slow_clusters(points, groups):
    """Alg. 1 with lists: merge the two neighbouring clusters with the closest means."""
    clusters = [[i] for i in range(len(points))]
    while len(clusters) > groups:
        means = [points[members].mean(0) for members in clusters]
        distances = [float((means[k] - means[k + 1]).square().sum()) for k in range(len(clusters) - 1)]
        k = distances.index(min(distances))
        clusters[k : k + 2] = [clusters[k] + clusters[k + 1]]
    return torch.tensor([k for k, members in enumerate(clusters) for _ in members])


@pytest.mark.parametrize("groups", [1, 2, 5, 11, 20])
def test_it_is_the_papers_loop(normal, groups):
    points = normal(20, 6).cumsum(0)
    assert torch.equal(adjacent_clusters(points, groups), slow_clusters(points, groups))


def test_groups_are_runs_of_steps_that_cover_all_of_them(normal):
    found = adjacent_clusters(normal(20, 6), 7)
    assert len(found) == 20 and torch.equal(found.unique(), torch.arange(7)) and bool((found.diff() >= 0).all())


def test_as_many_groups_as_steps_leaves_each_alone_and_one_group_holds_the_mean(normal):
    points = normal(9, 4)
    assert torch.equal(adjacent_clusters(points, 9), torch.arange(9))
    torch.testing.assert_close(group_means(points, adjacent_clusters(points, 1))[0], points.mean(0))


def test_fewer_groups_are_a_coarsening_of_more(normal):
    points = normal(20, 6)
    fine, coarse = adjacent_clusters(points, 8), adjacent_clusters(points, 3)
    assert all(len(coarse[fine == group].unique()) == 1 for group in range(8))


@pytest.mark.parametrize("groups", [0, 5])
def test_an_impossible_number_of_groups_is_refused(normal, groups):
    with pytest.raises(ValueError, match="4 steps cannot be put into"):
        adjacent_clusters(normal(4, 2), groups)
