// Plays the finished front of a video while the rest is rendered: the pieces of an HLS playlist, fed to MediaSource.
// Browsers without MediaSource (iPhones) play the playlist by themselves.

const AHEAD = 60; // seconds around what is seen that the browser holds
const BEHIND = 60;
const LOOK = 2000; // milliseconds between two looks at the playlist

export class StreamPlayer {
  // `total`: seconds of the whole video; `told` hears how many of them are finished, and of errors.
  constructor(video, url, total, told) {
    this.video = video;
    this.url = url;
    this.told = told;
    this.pieces = [];
    this.over = false;
    this.stopped = new AbortController();
    const Source = window.ManagedMediaSource ?? window.MediaSource;
    if (!Source) {
      video.src = url;
      return;
    }
    video.disableRemotePlayback = true; // ManagedMediaSource asks for it
    this.source = new Source();
    this.address = URL.createObjectURL(this.source);
    video.src = this.address;
    this.source.addEventListener("sourceopen", () => this.run(total), { once: true });
  }

  stop() {
    this.stopped.abort();
    if (this.address) URL.revokeObjectURL(this.address);
  }

  async run(total) {
    const signal = this.stopped.signal;
    let looked = -Infinity;
    while (!signal.aborted) {
      try {
        if (!this.over && performance.now() - looked > LOOK) {
          await this.look();
          looked = performance.now();
        }
        const piece = this.next();
        if (piece) await this.append(piece, total);
        else if (this.over && this.source.readyState === "open" && this.holds(this.pieces.at(-1))) this.source.endOfStream();
        else await new Promise((resolve) => setTimeout(resolve, 200));
      } catch (error) {
        if (signal.aborted) return;
        this.told(null, error);
        await new Promise((resolve) => setTimeout(resolve, LOOK));
      }
    }
  }

  async look() {
    const answer = await fetch(this.url, { signal: this.stopped.signal });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    const pieces = [];
    let at = 0;
    let seconds = 0;
    let init = null;
    for (const line of (await answer.text()).split("\n")) {
      const [, map] = line.match(/^#EXT-X-MAP:URI="(.*)"/) ?? [];
      const [, length] = line.match(/^#EXTINF:([\d.]+)/) ?? [];
      if (map) init = new URL(map, answer.url).href;
      else if (length) seconds = Number(length);
      else if (line === "#EXT-X-ENDLIST") this.over = true;
      else if (line && !line.startsWith("#")) {
        pieces.push({ url: new URL(line, answer.url).href, init, start: at, stop: at + seconds });
        at += seconds;
      }
    }
    this.pieces = pieces;
    this.told(at, null);
  }

  holds(piece) {
    const middle = (piece.start + piece.stop) / 2;
    const ranges = this.buffer?.buffered;
    return Array.from({ length: ranges?.length ?? 0 }, (_, i) => ranges.start(i) <= middle && middle <= ranges.end(i)).some(Boolean);
  }

  next() {
    const now = this.video.currentTime;
    return this.pieces.find((piece) => piece.stop > now && piece.start < now + AHEAD && !this.holds(piece));
  }

  async append(piece, total) {
    if (this.init !== piece.init) {
      const header = await this.load(piece.init);
      if (!this.buffer) this.buffer = this.source.addSourceBuffer(`video/mp4; codecs="${codecs(header)}"`);
      await this.do(() => this.buffer.appendBuffer(header));
      if (total && !this.init) this.source.duration = total;
      this.init = piece.init;
    }
    const old = this.video.currentTime - BEHIND;
    if (this.buffer.buffered.length && this.buffer.buffered.start(0) < old - 10) await this.do(() => this.buffer.remove(0, old));
    const content = await this.load(piece.url);
    await this.do(() => this.buffer.appendBuffer(content));
  }

  async load(url) {
    const answer = await fetch(url, { signal: this.stopped.signal });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    return new Uint8Array(await answer.arrayBuffer());
  }

  do(work) {
    return new Promise((resolve, reject) => {
      this.buffer.addEventListener("updateend", resolve, { once: true });
      this.buffer.addEventListener("error", () => reject(new Error("the browser can't play this")), { once: true });
      work();
    });
  }
}

// What MediaSource wants to know of a header: H.264's profile and level from its avcC box; the sound is AAC-LC.
function codecs(header) {
  const name = [..."avcC"].map((letter) => letter.charCodeAt(0));
  const place = header.findIndex((_, i) => name.every((byte, k) => header[i + k] === byte));
  const [profile, constraints, level] = header.slice(place + 5, place + 8);
  return `avc1.${[profile, constraints, level].map((byte) => byte.toString(16).padStart(2, "0")).join("")}, mp4a.40.2`;
}
