import json


def test_all_recipes_are_listed(command):
    code, out, _ = command("recipes")
    assert code == 0
    names = [line.split("\t")[0] for line in out.splitlines()]
    assert names == sorted(names)
    assert {"digits_orepa", "fashion_dbb", "orepa_table4_resnet18_orepa", "finetune_folder"} <= set(names)
    line = next(line for line in out.splitlines() if line.startswith("orepa_table3_scalar\t"))
    assert "72.04 %" in line
    assert "OREPA (2204.00826), table 3" in line


def test_a_pattern_and_json(command):
    code, out, _ = command("recipes", "repvgg_table5_*", "--json")
    assert code == 0
    assert [row["top1"] for row in json.loads(out)] == [79.38, 80.52, 80.21]


def test_no_match(command):
    code, _, err = command("recipes", "x*")
    assert (code, "no recipe matches 'x*'" in err) == (2, True)
