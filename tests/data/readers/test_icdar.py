import pytest

from llava_patch.core.errors import InputError, SettingError
from llava_patch.data.readers import read_samples

from .common import page, quad, text


def read(tmp_path, *lines, name="p.txt", **kwargs):
    page(tmp_path / "p.png")
    text(tmp_path / name, *lines)
    return read_samples(tmp_path, **kwargs)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{quad(10, 5, 60, 20)},Total, net, 5", "Total, net, 5"),
        ('10, 5, 60, 20, "Main Street"', "Main Street"),  # ICDAR 2013, test
        ('10 5 60 20 "Main Street"', "Main Street"),  # ICDAR 2013, training
        ("10\t5\t60\t20\ta, b", "a, b"),
        ("10;5;60;20;a; b", "a; b"),
        ("10,5,60,20,3,5", "3,5"),  # a price with a comma
        (f"{quad(10, 5, 60, 20)},Latin,Main, Street", "Main, Street"),  # MLT
        (f'{quad(10, 5, 60, 20)},"size 6"", wide"', 'size 6", wide'),  # csv
        (f'{quad(10, 5, 60, 20)},"a" or "b"', '"a" or "b"'),
        ("10.0,5.0,60.0,20.0,x", "x"),
        ('"10","5","60","20","x, y"', "x, y"),
    ],
)
def test_layouts_of_a_line(tmp_path, line, words):
    (sample,) = read(tmp_path, line)
    assert (sample.text, sample.boxes) == (words, ((10, 5, 60, 20),))
    assert (sample.id, sample.where) == ("p.txt:1", f"{tmp_path}/p.txt:1")
    assert sample.image == tmp_path / "p.png"
    assert sample.document == "p.png"


def test_quadrilaterals_become_the_box_around_them(tmp_path):
    (sample,) = read(tmp_path, "12,5,60,9,58,20,10,16,tilted")
    assert sample.boxes == ((10, 5, 60, 20),)


def test_layout_is_that_of_most_lines(tmp_path):
    """Texts that are numbers look like more coordinates."""
    samples = read(tmp_path, "1,2,30,12,one", "1,15,30,25,4,5,6,7,8", "1,30,30,40,three")
    assert [s.text for s in samples] == ["one", "4,5,6,7,8", "three"]


def test_order_ids_blank_lines_and_unread_regions(tmp_path):
    lines = [f"{quad(1, 1, 9, 9)},first", "", f"{quad(10, 1, 19, 9)},###", f"{quad(20, 1, 29, 9)},*"]
    lines += [f"{quad(30, 1, 39, 9)},", f"{quad(40, 1, 49, 9)},last"]
    samples = read(tmp_path, *lines)
    assert [(s.text, s.id.rpartition(":")[2]) for s in samples] == [("first", "1"), ("last", "6")]
    assert samples.unread == 3
    assert samples.format == "icdar"
    for sample in samples:
        assert [box[0] for box in sample.all_boxes] == [1, 10, 20, 30, 40]


def test_header_of_a_csv_is_left_out_only_in_our_order(tmp_path):
    assert [s.id[-1] for s in read(tmp_path, "x1,y1,x2,y2,text", "1,2,3,4,a", name="p.csv")] == ["2"]
    assert [s.text for s in read(tmp_path, "x1;y1;x2;y2;text", "1;2;3;4;a, b", name="p.csv")] == ["a, b"]
    with pytest.raises(InputError, match=r"p.csv:1: 'x1,x2,y1,y2,text' does not open with numbers"):
        read(tmp_path, "x1,x2,y1,y2,text", "1,2,3,4,a", name="p.csv")


@pytest.mark.parametrize(
    ("encoding", "ending"), [("utf-8-sig", "\r\n"), ("cp1252", "\n"), ("utf-8", "\r"), ("utf-16", "\r\n")]
)
def test_encodings_and_line_ends(tmp_path, encoding, ending):
    page(tmp_path / "p.png")
    lines = f"{quad(1, 1, 9, 9)},Café 5 €", f"{quad(1, 11, 9, 19)},naïve\u00a0x"
    text(tmp_path / "p.txt", *lines, ending=ending, encoding=encoding)
    assert [s.text for s in read_samples(tmp_path)] == ["Café 5 €", "naïve\u00a0x"]


@pytest.mark.parametrize(
    ("images", "boxes", "name"),
    [
        ("img/7.jpg", "box/7.txt", ""),
        ("images/img_12.jpg", "gt/gt_img_12.txt", ""),
        ("train/img_3.png", "train/img_3.png.txt", ""),
        ("Scan.JPG", "scan_gt.csv", ""),
        ("img/7.jpg", "box/7.txt", "box"),  # the annotations' folder alone
        ("img/7.jpg", "box/7.txt", "box/7.txt"),
        ("7.jpg", "7.txt", "7.txt"),
    ],
)
def test_where_images_are(tmp_path, images, boxes, name):
    image = page(tmp_path / images)
    text(tmp_path / boxes, f"{quad(1, 1, 9, 9)},x")
    (sample,) = read_samples(tmp_path / name)
    assert sample.image.samefile(image)


def test_splits_with_the_same_names_keep_their_images(tmp_path):
    for split, width in (("train", 50), ("test", 80)):
        page(tmp_path / split / "img" / "1.png", width)
        text(tmp_path / split / "box" / "1.txt", f"{quad(1, 1, 9, 9)},{split}")
    assert {s.text: s.open_image().width for s in read_samples(tmp_path)} == {"train": 50, "test": 80}
    page(tmp_path / "train" / "img" / "1.jpg", 50)
    with pytest.raises(InputError, match=r"train/box/1.txt: which image is it of"):
        read_samples(tmp_path)


def test_numbers_in_names_are_in_order_and_other_files_are_left_out(tmp_path):
    for number in (10, 9, 1):
        page(tmp_path / f"img_{number}.png")
        text(tmp_path / f"img_{number}.txt", f"{quad(1, 1, 9, 9)},{number}")
    text(tmp_path / "entities" / "img_1.txt", '{"total": "5"}')  # SROIE's key information
    text(tmp_path / "readme.txt", "see the licence")
    assert [s.text for s in read_samples(tmp_path)] == ["1", "9", "10"]


def test_images_elsewhere(tmp_path):
    page(tmp_path / "far" / "away" / "p.png")
    text(tmp_path / "gt" / "deep" / "p.txt", f"{quad(1, 1, 9, 9)},x")
    for source, keyword in ((f"{tmp_path}/gt?images={tmp_path}/far", ""), (f"{tmp_path}/gt", tmp_path / "far")):
        assert read_samples(source, images=keyword)[0].image == tmp_path / "far" / "away" / "p.png"
    with pytest.raises(InputError, match=r"p.txt: its image is missing: no p.jpg"):
        read_samples(tmp_path / "gt" / "deep")


GOOD = f"{quad(1, 1, 9, 9)},fine"
BROKEN = [
    ("1,2,3,4,5,6,7,last", "7 coordinates, then 'last'"),
    ("no numbers", "does not open with numbers"),
    ("1,2,3", "3 coordinates and nothing else"),
    ("1,2,3,4,5,6,x7,8,word", "6 coordinates, then 'x7'"),
    ("1,2,nan,4,5,6,7,8,word", "2 coordinates, then 'nan'"),
    (f"{quad(5, 5, 5, 9)},word", "empty box"),
    (f"{quad(5, 5, 300, 9)},word", "outside its image of 100 x 60"),
]


@pytest.mark.parametrize(("line", "words"), BROKEN)
def test_broken_lines_are_named_or_skipped_and_counted(tmp_path, line, words):
    with pytest.raises(InputError, match=rf"p.txt:2: .*{words}"):
        read(tmp_path, GOOD, line, GOOD)
    samples = read(tmp_path, GOOD, line, GOOD, broken="skip")
    assert [s.id[-1] for s in samples] == ["1", "3"]
    (message,) = samples.skipped
    assert "p.txt:2" in message
    assert words in message


def test_reversed_box_is_not_turned_round(tmp_path):
    with pytest.raises(InputError, match=r"p.txt:1: empty box"):
        read(tmp_path, "60,20,10,5,x")


def test_missing_and_broken_images(tmp_path):
    page(tmp_path / "a.png")
    text(tmp_path / "a.txt", GOOD)
    text(tmp_path / "b.txt", GOOD)
    with pytest.raises(InputError, match=r"b.txt: its image is missing"):
        read_samples(tmp_path)
    text(tmp_path / "b.png", "no image")
    with pytest.raises(InputError, match=r"b.txt:1: image .*b.png cannot be read"):
        read_samples(tmp_path)
    samples = read_samples(tmp_path, broken="skip")
    assert len(samples) == len(samples.skipped) == 1


def test_no_usable_sample_left(tmp_path):
    with pytest.raises(InputError, match=r"no usable sample.* 1 regions without a transcript, 1 things skipped; .*:2"):
        read(tmp_path, f"{quad(1, 1, 9, 9)},###", "1,2,3,4,5,x", broken="skip")


def test_regions_of_a_page_are_joined(tmp_path):
    for name in ("a", "b"):
        page(tmp_path / f"{name}.png")
        text(tmp_path / f"{name}.txt", *(f"{quad(1, 10 * i + 1, 9, 10 * i + 9)},{name}{i}" for i in range(3)))
    samples = read_samples(tmp_path, boxes_per_sample=2)
    assert [s.text for s in samples] == ["a0\na1", "a2", "b0\nb1", "b2"]
    assert samples[0].boxes == ((1, 1, 9, 9), (1, 11, 9, 19))
    assert samples[1].boxes == ((1, 21, 9, 29),)
    assert all(len(s.all_boxes) == 3 for s in samples)
    assert [s.id.rpartition("/")[2] for s in samples] == ["a.txt:1", "a.txt:3", "b.txt:1", "b.txt:3"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('10 5 60 20 "24 7 365 1"', "24 7 365 1"),
        ('10,5,60,20,"24,7,365,1"', "24,7,365,1"),
        ('10,5,60,20,"58,35,8,20"', "58,35,8,20"),  # the corners of a tilted sign, but for the quotes
        ('10;5;60;20;"24";7', '"24";7'),
        (f'{quad(10, 5, 60, 20)},"5"', "5"),
        ('"10","5","60","20","7"', "7"),
        (r'10 5 60 20 "a \"b\""', 'a "b"'),
        (r'10,5,60,20,"\"b\", c"', '"b", c'),
        ('10,5,60,20,"a ""b"""', 'a "b"'),
        (r'10,5,60,20,"C:\dir"', r"C:\dir"),
        ('10,5,60,20,5"', '5"'),
        ('10,5,60,20,"', '"'),
        ('10,5,60,20,"a","b"', '"a","b"'),
    ],
)
def test_quotes_are_cut_before_numbers_are_told_from_text(tmp_path, line, words):
    (sample,) = read(tmp_path, line)
    assert (sample.text, sample.boxes) == (words, ((10, 5, 60, 20),))


@pytest.mark.parametrize(
    ("lines", "box", "words"),
    [
        (["10,5,60,20,1,2,3,4"], (10, 5, 60, 20), "1,2,3,4"),  # corners would cross each other
        (["10,5,60,20,70,2000,30,4000"], (10, 5, 60, 20), "70,2000,30,4000"),  # far outside the image
        (["10,5,60,20,58,35,8,20"], (8, 5, 60, 35), None),  # in doubt alone: corners of a tilted sign, or a number
        (["10,5,60,20,58,35,8,20", "1,2,30,12,word"], (10, 5, 60, 20), "58,35,8,20"),
        (["10,5,60,20,58,35,8,20", f"{quad(1, 2, 30, 12)},word"], (8, 5, 60, 35), ""),
        (["10,5,60,20,58,35,8,20,word"], (8, 5, 60, 35), "word"),
        (["10,5,60,20,58,35,8,20,12"], (8, 5, 60, 35), "12"),
        (["x1,y1,x2,y2,text", "10,5,60,20,58,35,8,20"], (10, 5, 60, 20), "58,35,8,20"),
        (["x1,y1,x2,y2,x3,y3,x4,y4,text", "10,5,60,20,58,35,8,20,1"], (8, 5, 60, 35), "1"),
    ],
)
def test_four_coordinates_and_a_number_are_told_from_eight(tmp_path, lines, box, words):
    if words is None:
        with pytest.raises(InputError, match=r"p.txt:1: .*58,35,8,20.*\?coordinates=8 or \?coordinates=4"):
            read(tmp_path, *lines)
        (sample,) = read_samples(f"{tmp_path}?coordinates=4")
        assert (sample.text, sample.boxes) == ("58,35,8,20", ((10, 5, 60, 20),))
        with pytest.raises(InputError, match="1 regions without a transcript"):  # nobody read the corners
            read_samples(f"{tmp_path}?coordinates=8")
        return
    samples = read(tmp_path, *lines)
    assert samples[0].all_boxes[0] == box and (samples[0].text == words if words else samples.unread == 1)


def test_the_option_settles_every_line(tmp_path):
    read(tmp_path, f"{quad(1, 2, 30, 12)},9")
    (sample,) = read_samples(f"{tmp_path}?coordinates=8")
    assert sample.text == "9"
    with pytest.raises(InputError, match=r"p.txt:1: empty box .1.0, 2.0, 30.0, 2.0."):
        read_samples(f"{tmp_path}?coordinates=4")
    with pytest.raises(SettingError, match="coordinates=6: expected one of 8, 4"):
        read_samples(f"{tmp_path}?coordinates=6")


def test_a_region_over_the_edge_is_cut_and_kept(tmp_path):
    samples = read(tmp_path, "-3,5,60,20,first", "90,30,106,64,###", "40,30,103,58,last")
    assert [s.boxes for s in samples] == [((0, 5, 60, 20),), ((40, 30, 100, 58),)]
    assert samples[0].all_boxes == ((0, 5, 60, 20), (90, 30, 100, 60), (40, 30, 100, 58))
    with pytest.raises(InputError, match=r"p.txt:1: box .* is outside its image of 100 x 60 pixels;"):
        read(tmp_path, "120,5,160,20,nothing of it inside")


def test_regions_without_text_and_area_are_nothing(tmp_path):
    samples = read(tmp_path, GOOD, "0,0,0,0,0,0,0,0,", f"{quad(5, 5, 5, 9)},###", f"{quad(20, 5, 30, 9)},###")
    assert (len(samples), samples.unread, len(samples[0].all_boxes)) == (1, 3, 2)


def test_numbers_beyond_floats_are_named(tmp_path):
    for number in ("1e400", "9" * 400, "-1e999"):
        with pytest.raises(InputError, match=r"p.txt:2: a coordinate is not finite"):
            read(tmp_path, GOOD, f"1,1,9,1,{number},9,1,9,x")
