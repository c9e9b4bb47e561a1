"""The table of data sets: where each file lives, its size, its checksum and its licence.

A row of `_files` is: path  bytes  sha256  [bytes and sha256 of the gunzipped contents].
The sha256 of MNIST, Fashion-MNIST and CIFAR-10 are the ones their publishers' files have in
the checksum lists of several independent libraries; for the idx sets the contents are what is
checked, so a file that was gunzipped or gzipped anew is accepted too.
"""

from typing import NamedTuple


class File(NamedTuple):
    """One file of a data set."""

    path: str  # below the data set's folder, with "/"
    size: int  # bytes, as published
    sha256: str  # of the bytes as published
    content_size: int = 0  # bytes after gunzip; 0: the file is not an idx .gz
    content_sha256: str = ""


class DataSet(NamedTuple):
    """One folder of files with a common origin."""

    folder: str
    about: str
    origin: str
    licence: str
    files: tuple[File, ...]
    urls: tuple[str, ...]  # prefixes to try in order, each ends with "/"

    def file(self, path: str) -> File:
        return next(f for f in self.files if f.path == path)


def _files(rows: str) -> tuple[File, ...]:
    def one(path: str, size: str, sha: str, content_size: str = "0", content_sha: str = "") -> File:
        return File(path, int(size), sha, int(content_size), content_sha)

    return tuple(one(*row.split()) for row in rows.strip().splitlines())


_MOLECULES = """
H2_STO3g_4qubits/jw.txt 447 0665b769d58fa582d41a8770d8e072e1b86d9f1568745d211b32da95ad6a3788
H2_STO3g_4qubits/parity.txt 451 e7d44b946b565ffbb85184ef2268a0b5f1004cad919f889e60a0435a2fbaacb6
H2_STO3g_4qubits/bk.txt 453 f9a4136cf50d0105319d5ceab1a50d9fa57d54893535a4f962527b8f5c1d2ec3
H2_STO3g_4qubits/ExactEnergy.txt 398 efc796f540f7983c8d2b8bf42e05a95df8d033cadaca96d720a7b034b0922f5f
H2_STO3g_4qubits/hartree_fock_bitstrings.txt 60 d17d2eb66a6d2ab913cb3805c2aa996bbb1812fa4075c24bf8d99b3a5276fd5e
H2_6-31G_8qubits/jw.txt 14239 b43f79db59d07ab6ff7fe3a1e2a5cc8dc0c38b867498b27b0185441da1ba02fb
H2_6-31G_8qubits/parity.txt 14224 90024381b1ecac2a497f9b815df906b78a243e8e14ade13f27e2e329a81483c4
H2_6-31G_8qubits/bk.txt 14217 3e6764600f1670e51d16286dc7b5b9d15e7cfb1b8cbdc3c50470ca8960ad450e
H2_6-31G_8qubits/ExactEnergy.txt 331 539a177819e163f83c854b878c721415c0ee2662345768e9c4977a1e37c09457
H2_6-31G_8qubits/hartree_fock_bitstrings.txt 64 5d34de463d27ed9bf907ffad14e6490464667e2da797cbff36bddde844427d9e
LiH_STO3g_12qubits/jw.txt 24960 63fcaea44fafe91a04cd46cb54e1f4c2e927e805fe30728ea6408895f812dae2
LiH_STO3g_12qubits/parity.txt 24995 b51eac4d788ec3f0b666e7dcf1fc8c9acf389d74307c27731870a7aa5c2e0658
LiH_STO3g_12qubits/bk.txt 25122 48f72e5b8fe9c60ab5b960953b7a5842b7b0e63ab229dc31619e49fef400ce19
LiH_STO3g_12qubits/ExactEnergy.txt 394 90fc313b3dd2cb929a7d6d60957010262e25dc77e0ff59caea71047131966a26
LiH_STO3g_12qubits/hartree_fock_bitstrings.txt 68 ff0ddba796ab3bdfdfdb1f18c58c47fc9182cb68a22b15023474ff2e98763969
BeH2_STO3g_14qubits/jw.txt 27438 e5e5497f954771763f6f694d6d7ba4e4351daba9bccb8f867eccc5d859ba4322
BeH2_STO3g_14qubits/parity.txt 27517 433b5af648e24751c0203e2aea91003f83e90f355cd0f05ddd263460a9a1a3d1
BeH2_STO3g_14qubits/bk.txt 27535 6f7d19273ef98826a6e8a47ff072cad2d4effa6a2173fbb5e072f1104919e607
BeH2_STO3g_14qubits/ExactEnergy.txt 64 0d8774bcf52d839d6ab2e37861229d9ee713a1567003a99cda9100d231862296
BeH2_STO3g_14qubits/hartree_fock_bitstrings.txt 70 24488e30e7ee27ce2470e2ecc920188ee90fd288e9335c6c31f275a622805bb1
H2O_STO3g_14qubits/jw.txt 44901 ec3b014877f8dd0c5105df43cadd47e9f90fa24f27a548e1f0d16ca67c1f2cd7
H2O_STO3g_14qubits/parity.txt 44796 09d93c19c447102df114a312b26267d90a1d1bdbe97f70553382b262a4903847
H2O_STO3g_14qubits/bk.txt 44929 ae4f2a9042d0da7efa648c801b021c40f3dba450227e22e6d0aa87601fac2b1a
H2O_STO3g_14qubits/ExactEnergy.txt 392 94bc886e9990d4cd143165d8c17c8729bda7d71cc69a15519d7064086568888f
H2O_STO3g_14qubits/hartree_fock_bitstrings.txt 70 1dd91539b3aae71764afdd0058c80a6fe962d8715ee1cf960f95ba4f8da05729
"""

DATASETS: dict[str, DataSet] = {
    "mnist": DataSet(
        folder="mnist",
        about="MNIST: 60,000 + 10,000 grey 28x28 handwritten digits, 10 classes",
        origin="Y. LeCun, C. Cortes, C. Burges, yann.lecun.com/exdb/mnist",
        licence="CC BY-SA 3.0 as commonly stated",
        files=_files("""
train-images-idx3-ubyte.gz 9912422 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609 47040016 ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db
train-labels-idx1-ubyte.gz 28881 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c 60008 65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5
t10k-images-idx3-ubyte.gz 1648877 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6 7840016 0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7
t10k-labels-idx1-ubyte.gz 4542 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6 10008 ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2
"""),
        urls=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
    ),
    "fashion_mnist": DataSet(
        folder="fashion_mnist",
        about="Fashion-MNIST: 60,000 + 10,000 grey 28x28 pieces of clothing, 10 classes",
        origin="H. Xiao, K. Rasul, R. Vollgraf 2017 (arXiv 1708.07747), github zalandoresearch/fashion-mnist",
        licence="MIT",
        files=_files("""
train-images-idx3-ubyte.gz 26421880 3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84 47040016 c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
train-labels-idx1-ubyte.gz 29515 a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845 60008 bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
t10k-images-idx3-ubyte.gz 4422102 346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073 7840016 5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
t10k-labels-idx1-ubyte.gz 5148 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5 10008 0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34
"""),
        urls=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
    ),
    "cifar10": DataSet(
        folder="cifar10",
        about="CIFAR-10: 50,000 + 10,000 colour 32x32 photographs, 10 classes",
        origin="A. Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; research use by convention, cite Krizhevsky 2009",
        # The binary version is the one downloaded (no pickle); the python one is read if present.
        files=_files("""
cifar-10-binary.tar.gz 170052171 c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
cifar-10-python.tar.gz 170498071 6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce
"""),
        urls=("https://www.cs.toronto.edu/~kriz/",),
    ),
    "cifar10_subset": DataSet(
        folder="cifar10_subset",
        about="The first 8,000 training and first 1,000 test images of CIFAR-10",
        origin="A. Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.html; converted to one npz",
        licence="none stated; research use by convention, cite Krizhevsky 2009",
        files=_files("""
cifar10_subset.npz 25452309 908f7b512796eccb863d74d91fc96e34acd0ffc6603c20e82628e4d56e0aecdb
"""),
        urls=(),
    ),
    "tiny_shakespeare": DataSet(
        folder="tinyshakespeare",
        about="Tiny Shakespeare: 1,115,394 characters of plays, 65 distinct",
        origin="A. Karpathy, github karpathy/char-rnn",
        licence="the text is in the public domain",
        files=_files("""
input.txt 1115394 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
"""),
        urls=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/",
        ),
    ),
    "molecule": DataSet(
        folder="molecular_hamiltonians",
        about="Electronic Hamiltonians of H2, LiH, BeH2 and H2O as Pauli sums (jw, parity, bk)",
        origin="C. Hadfield 2021 (arXiv 2105.12207), github charleshadfield/adaptiveshadows; made with Qiskit and PySCF",
        licence="no licence file; the numbers are facts that PySCF or OpenFermion make again",
        files=_files(_MOLECULES),
        urls=(
            "https://raw.githubusercontent.com/charleshadfield/adaptiveshadows/1a987b753f3120311056dbea06bc1eb3d8b54b54/Hamiltonians/",
        ),
    ),
    "deepcubea": DataSet(
        folder="deepcubea",
        about="DeepCubeA's test states: 500 Rubik cubes, 250 15-puzzles, 250 Lights Out 7x7",
        origin="F. Agostinelli et al. 2019, github forestagostinelli/DeepCubeA; every second state, converted to npz",
        licence="MIT",
        files=_files("""
cube3_test.npz 43418 9d1ca8933460220e170739fe90a147abf2041e1838abec904c4d3da2ba24384f
puzzle15_test.npz 9563 d2d2cef2ded027e2f78c1cab3dbc4dd29809dedba5a614c96f8be79bdea83698
lightsout7_test.npz 2274 4192a0c086f1f9909c334e34ee0737ade74f6a2887d7b6d84be64c10901f5c4f
"""),
        urls=(),
    ),
    "deepcubea_original": DataSet(
        folder="deepcubea",
        about="DeepCubeA's test states as published: 1,000 cubes, 500 15-puzzles, 500 Lights Out 7x7",
        origin="F. Agostinelli et al. 2019, github forestagostinelli/DeepCubeA",
        licence="MIT",
        files=_files("""
cube3/test/data_0.pkl 795286 f11a2a6bf0cfcca446932ae31fd0898a9474ab354703f792ec3a91f88ff30507
puzzle15/test/data_0.pkl 159372 a9893b09be81b0a219dd3704af7a65c444c963a63623dac1a1de2b37372c2e28
lightsout7/test/data_0.pkl 48682 726e11f69f710da6d34c8b59024fcf0da5bfa70d9eb993e20d316e9e615530f5
"""),
        urls=(
            "https://raw.githubusercontent.com/forestagostinelli/DeepCubeA/919489f14ecbbc80dc1bf1539ac0a462ffaca7c5/data/",
        ),
    ),
}
