"""Digests of LLM-Adapters' data files: task, split, SHA-256 (`-` where the file was not at hand), git blob id.

Blob ids: AGI-Edgerunners/LLM-Adapters, HEAD 8166572; they let a download be verified with `git hash-object`.
"""

from __future__ import annotations

from inlay.tasks.task import Checksum

_FILES = """
AddSub           test  62a8662b1ad40879953c4df0e61883a749d03aa3fc5e71f1cdb842b816e139ff  f3996cdf4159b4e1e4b6768865a4db72105f4e2f
MultiArith       test  a40f426807c8a563802c2a5b66bda3bcd1eba9c099038fd1199f0dd57de5fd28  08e996c6cd8c633cc977f5c50709a8bbfc8fadff
SingleEq         test  712b15edb851c97aab42a5de106d94008f94d917366c92537ed5400a8aacb207  cce7a868400323e30e2094a15d482c1aa743dbb0
gsm8k            test  2cc616a1e0b23ea1df29370476365cde71c4e0aa823fb06cc194c5a8a9381abe  57a7a08e10e12e975e1f972d2b8125c0d4c722b1
SVAMP            test  ffed015784f738f317c5603177861d044c4fc94e09211d78b25e96d46c656e2c  98b8f1872db596f8aaff2c95d1d698a9fa13b94f
AQuA             test  de677f5f0139340009eb01f17c0db781b4161912cd1f4efa77292f2fcf3478ee  731fbb456f7a93bb4121125de09c4adcf42e5dab
MAWPS            train 42e631004e46e71f5e050bfd6f0af2e27c9d76315cee66cc6412d66a19b47c1a  30ce34399859c115cb391ac96fd009f71f5ba98f
MAWPS            test  c1a708979cbf2b3df9ac4020baacf3e8e73fcf089e1de7dd1b305b810bfaa15f  eca473c5b5d398acbae0b84ede833bbbccd63add
MathQA           test  58715cb7aaccc7f3f2994586073800a57a3e44f77d22e62bee7fd7ff8315172c  4395ded7d91bd4fb1192ba3981f6ef00ccc88570
boolq            train 5ccbaceebaddc69765e1c4a363632196b81851d303696672165ab59ec4e48c83  87a7beee26b49f81c450641ef2ff84f55611321f
boolq            test  89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9  6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3
piqa             train -  44326ba946f8bd645bfa7a189e619d29b5bc17e5
piqa             test  3860d11b9b42e590b6b4bbc1643214d373ed0b0d4ac62fcc7bdceb8e044ad141  f7a1c260692ef31796d4763cb6334f316a754fed
social_i_qa      train -  bd524129d80efdfabc8476bbedc4f41b400cfda0
social_i_qa      test  71543f41127451945379d106ffedaef502f1c8770dff6d2f543aca85e3080b1d  eadf221799ca394367b144c0f86ee0436db409d2
hellaswag        train -  ca68dc85fc2a2f73c9b1b8b0823cc41a8f669718
hellaswag        test  -  183c4920415f83ba4b793c4873a33e7e10bd1be5
winogrande       train -  0b56375ac6b4464fa97abfb72812f15c772ba305
winogrande       test  6946f5209e7114c65c6d04f8f644c5a061af20d730b1cfe158fff3dc44076fb9  21257263593dd4d00546e1918c88ca0f357b08ad
ARC-Easy         train 6a06cece3dec32f4fb1c1b0fc29dab14be7cf3053b417290dbc6cd845359f5ff  488a8e5e5bbbd7a630ebbfe07a1fd91b7d9d8c9b
ARC-Easy         test  3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc  6c0d30aaedaeca148df6bcd7aaacf7c31e6ad70f
ARC-Challenge    train a9debff28aafed86a08211dc3584a3b6cb38edca8c56bb34cd5002ed54aeebfb  d7e080b04bff9fd16dd85455fb04481807a088d8
ARC-Challenge    test  4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7  9540685439144200b5a7e48dab9ca4655be2af09
openbookqa       train a1e094eeea01f70c0baa880f37497b26700ae99b243927b9c529984de9b1fe90  75bcd5eb9f5e77a3796c05e6bb38f169d19563fc
openbookqa       test  8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e  a6e69676104bcb77237388c3b5a3f0dcbb81d1e2
math_data        train 1d06633b4db748b7cfa38f2891f8d7b17b3636717b3188dd382045b94cf999a7  22a588e69121103120d4b5173f1a6ea804d15a44
math_7k          train -  fd93bf268b53bb644b38e71270cdf633951ba3e0
math_10k         train -  27dba77d6ed80aa118d78fbafa5cecd651f6d463
math_14k         train -  7dc3a2312d83bd5cd6388ecd5d530f2ff6ed1ad6
math_50k         train -  61fcf3e08fc90a922be320441019d6022e25f5d0
commonsense_15k  train -  3716afef6d384c475dba13f88a5a96c8032dafe2
commonsense_170k train -  529e426b33d4cdb1d0c4a275a1a7245ad081fd91
"""  # noqa: E501


def of(name: str) -> dict[str, Checksum]:
    """Split to digests of the task `name`; empty where none is known."""
    rows = (line.split() for line in _FILES.strip().splitlines())
    return {split: Checksum(None if sha == "-" else sha, blob) for task, split, sha, blob in rows if task == name}
