"""Chats: the records that other trainers of video-language models read (LLaVA, ms-swift, OpenAI, TRL), and
the one clip that each of them makes. data/curation/importers.py reads the files."""

import re
from dataclasses import dataclass, field

# Placeholders of the video in a prompt: LLaVA (<image> too, in LLaVA-Video-178K), ms-swift, VILA, InternVL,
# Qwen.
MARK = re.compile(
    r"<\|vision_start\|><\|(?:video|image)_pad\|><\|vision_end\|>|<\|?(?:vila/)?(?:video|image)(?:_pad)?\|?>", re.IGNORECASE
)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "bot": "assistant", "chatgpt": "assistant", "system": "system", "developer": "system"}  # fmt: skip
PATH_KEYS = ("path", "url", "video", "video_url", "file")


class Unusable(Exception):
    """Why a record cannot be used: reason, field, what was found, the fix."""

    def __init__(self, reason: str, name: str, found: object, fix: str):
        self.reason, self.name, self.found, self.fix = reason, name, found, fix


@dataclass
class Turn:
    """What one side says, and the files in it. times: start and end of the video, if they are given with it."""

    role: str
    text: str
    videos: list[object] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    times: tuple[object, object] = (None, None)


@dataclass
class ChatClip:
    """What a chat says about its one video. names: our field -> where it is in the record; notes: what is
    left out, to be counted; further: (field, text) of the turns that make no clip."""

    video: str
    caption: str
    names: dict[str, str]
    start: object
    end: object
    prompt: str | None
    notes: tuple[str, ...]
    further: list[tuple[str, str]]


def without_mark(text: str) -> str | None:
    """A prompt without the mark of its video: at its head, its end or on a line of its own. None if there are
    several, or if it is a word of a sentence.

    >>> without_mark("<video>\\nWhat happens?"), without_mark("What happens in <video>?")
    ('What happens?', None)
    """
    head, *tail = MARK.split(text)
    if not tail:
        return text.strip()
    alone = head.rstrip(" ").endswith("\n") and tail[0].lstrip(" ").startswith("\n")
    if len(tail) > 1 or (head.strip() and tail[0].strip() and not alone):
        return None
    return f"{head.strip()}\n{tail[0].strip()}".strip()


def video_path(value: object, name: str) -> object:
    """The path in a video's entry: the entry itself, or {"path"}, {"url"}, {"video_url": {"url"}}, or a list of one."""
    if isinstance(value, list) and len(value) == 1:
        return video_path(value[0], name)
    if isinstance(value, list):
        if value and all(isinstance(x, str) and x.lower().endswith((".jpg", ".jpeg", ".png", ".webp")) for x in value):
            raise Unusable("pictures in place of a video", name, value, "make a video of them")
        raise Unusable("more than one video" if value else "no video", name, value, "name one video")
    if isinstance(value, dict):
        for key in (key for key in PATH_KEYS if value.get(key)):
            return video_path(value[key], f"{name}.{key}")
        if value.get("bytes"):
            fix = "write each video to a file, and name that in a field path"
            raise Unusable("video inside the file", name, "bytes", fix)
        raise Unusable("no video", name, value, "name the video's path")
    return value


def as_list(value: object) -> list:
    """A field that may be missing, one thing or several, as a list."""
    return value if isinstance(value, list) else [value] if value else []


def chat_turns(entry: dict) -> tuple[str, list]:
    """The turns of a record as they are written, and the field that holds the answers."""
    system = [{"role": "system", "content": text} for text in as_list(entry.get("system")) if isinstance(text, str)]
    for name in ("conversations", "messages", "conversation"):
        if name in entry:
            if not isinstance(entry[name], list) or not entry[name]:
                raise Unusable("malformed record", name, entry[name], "give a list of turns")
            return name, system + entry[name]
    for query, answer in (("query", "response"), ("instruction", "output")):
        if answer in entry:
            asked = [entry.get(query), entry.get("input") if query == "instruction" else None]
            turns = [{"role": "user", "content": "\n".join(text for text in asked if isinstance(text, str) and text)}]
            for pair in reversed(as_list(entry.get("history"))):
                turns = [dict(zip(("human", "assistant"), as_list(pair))), *turns]
            return answer, [*system, *turns, {"role": "assistant", "content": entry[answer]}]
    for answer in ("completion", "chosen"):
        if answer in entry:
            turns = []
            for name, role in (("prompt", "user"), (answer, "assistant")):
                value = entry.get(name) or []
                turns += value if isinstance(value, list) else [{"role": role, "content": value}]
            return answer, system + turns
    fix = "give conversations, messages, query and response, or prompt and completion"
    raise Unusable("no assistant turn", "", list(entry), fix)


def read_turns(turns: list, name: str) -> list[Turn]:
    """Checked turns: {"from", "value"}, {"role", "content"} with a text or a list of parts, {"human", "assistant"}."""
    out = []
    for i, turn in enumerate(turns):
        place = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise Unusable("malformed record", place, turn, 'write {"role": ..., "content": ...}')
        if "role" not in turn and "from" not in turn:
            pair = [(role, turn[role]) for role in ("human", "user", "gpt", "assistant") if role in turn]
            if not pair:
                raise Unusable("malformed record", place, turn, 'write {"role": ..., "content": ...}')
            out += [read_turn(role, content, place) for role, content in pair]
        else:
            out.append(read_turn(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")), place))
    return out


def read_turn(role: object, content: object, place: str) -> Turn:
    """One turn, its texts joined by new lines."""
    if str(role).lower() not in ROLES:
        raise Unusable("unknown role", place, role, f"give one of {', '.join(ROLES)}")
    turn, texts = Turn(ROLES[str(role).lower()], ""), []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
            continue
        part = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        kind = part.get("type") or next((k for k in ("video", "video_url", "image", "image_url", "audio") if k in part), "")
        if kind in ("video", "video_url", "input_video"):
            about = {key: value for key, value in part.items() if key != "type"}
            turn.videos.append(about)
            turn.times = about.get("video_start"), about.get("video_end")
        elif kind in ("image", "image_url", "input_image", "audio", "input_audio", "audio_url"):
            turn.others.append("audio" if "audio" in kind else "image")
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise Unusable("malformed record", place, content, "give a text, or a list of parts of type text and video")
    turn.text = "\n".join(text for text in texts if text.strip())
    return turn


def chat_clip(entry: dict) -> ChatClip:
    """The one clip of a chat: its video, the first prompt that is about it, and the answer. Raises Unusable."""
    name, written = chat_turns(entry)
    turns = read_turns(written, name)
    if entry.get("label") is False:
        raise Unusable("answer marked as bad", "label", False, "nothing; its answer is not to be learned")
    key = next((key for key in ("video", "videos", "video_path", "video_url") if entry.get(key)), "video")
    pictures = as_list(entry.get("image")) + as_list(entry.get("images"))
    shown = [x for x in pictures if str(x).lower().endswith((".mp4", ".mkv", ".webm", ".avi", ".mov"))]
    videos = [video_path(x, key) for x in as_list(entry.get(key)) + shown]
    placed = [part for turn in turns for part in turn.videos if any(part.get(k) for k in (*PATH_KEYS, "bytes"))]
    videos = list(dict.fromkeys(map(str, videos + [video_path(part, name) for part in placed])))
    others = {"image"} if len(pictures) > len(shown) else set()
    others |= {"audio"} if entry.get("audios") or entry.get("audio") else set()
    others |= {kind for turn in turns for kind in turn.others}
    if not videos:
        reason = f"only {' and '.join(sorted(others))}" if others else "no video"
        raise Unusable(reason, key, entry.get(key) or pictures, "nothing; clips need a video")
    if len(videos) > 1:
        raise Unusable("more than one video", key, videos, "write a record for each video, with what is said about it")
    if others:
        kinds = " and ".join(sorted(others))
        raise Unusable(f"{kinds} beside the video", key, sorted(others), f"nothing; a clip has no {kinds} of its own")

    asked = [i for i, turn in enumerate(turns) if turn.role == "user"]
    about = next((i for i in asked if turns[i].videos or MARK.search(turns[i].text)), asked[0] if asked else None)
    answer = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), None) if about is None else about + 1
    if answer is None or answer >= len(turns) or turns[answer].role != "assistant":
        raise Unusable("no assistant turn", name, [turn.role for turn in turns], "give the answer behind the prompt")
    prompt = None if about is None else turns[about].text
    caption = (without_mark(turns[answer].text) or "") if about is None else turns[answer].text
    further = []
    for i, turn in enumerate(turns):
        answers = turn.role == "assistant" and i > 0 and turns[i - 1].role == "user"  # told with its question
        if turn.role != "system" and i not in (about, answer) and not answers:
            further.append((f"{name}[{i}]", turn.text))
    notes = ("system texts left out",) if any(turn.role == "system" and turn.text.strip() for turn in turns) else ()
    notes += ("rejected answers left out",) if any(entry.get(k) for k in ("rejected", "rejected_response")) else ()
    start, end = turns[about].times if about is not None else (None, None)
    start, end = start if start is not None else entry.get("start"), end if end is not None else entry.get("end")
    names = {"video": key if not placed else name, "caption": f"{name}[{answer}]", "prompt": f"{name}[{about}]"}
    return ChatClip(videos[0], caption, names, start, end, prompt, notes, further)
