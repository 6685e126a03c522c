"""A run in which no answer is of use says so: its accuracy is no figure of the model."""

import scripted


def one_question(ltts, folder, tmp_path, *more):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "How many?", "answer": 18}\n')
    return ltts(
        "run", "model=coconut", f"model.checkpoint={folder}", "sampler=greedy", "n=1", "task=jsonl",
        f"task.path={questions}", *more,
    )  # fmt: skip


def test_answers_that_nobody_can_read_are_said(ltts, tmp_path):
    folder = scripted.make(tmp_path / "model", "coconut", "### none of it")
    done = one_question(ltts, folder, tmp_path)
    assert done.code == 0, done.err
    assert "100 % of the answers cannot be read by the task's rule, as in '### none of it'" in done.err


def test_answers_that_are_all_cut_off_are_said(run):
    done = run("max_answer_tokens=1", "model.eos=apples")
    assert "of the answers are cut off at max_answer_tokens" in done.err


def test_a_good_answer_needs_no_word(ltts, tmp_path):
    folder = scripted.make(tmp_path / "model", "coconut", "### 18")
    assert "of the answers" not in one_question(ltts, folder, tmp_path).err
