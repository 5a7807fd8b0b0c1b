package build

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

// statCache remembers the hashes of a context folder's files by what stat(2) says of them, so that an unchanged file is not read
// again. One file per context, buildcache/stat/<hash of its path>:
//
//	magic, then per file: u16 length of path, path, 6 × u64 (device, inode, size, mode, mtime, ctime in ns), 32 bytes sha256,
//	u8 1 when it has no extended attributes;
//	crc32 of all that
//
// Numbers are little-endian. Whatever is odd about the file makes it an empty cache. Two builds of one context at once overwrite
// each other's file, which costs hashing only.
type statCache struct {
	path string
	mu   sync.Mutex
	old  map[string]statEntry
	// next holds what this build saw, and goes to disk.
	next  map[string]statEntry
	dirty bool
}

type statEntry struct {
	id  [6]uint64
	sum [sha256.Size]byte
	// plain files have no extended attributes; setting one would change ctime.
	plain bool
}

const statMagic = "conex stat cache 2\n"

// statFixed is the length of an entry without its path.
const statFixed = 2 + 48 + sha256.Size + 1

// racy is how old a file's last change must be for its stat to prove anything: a write within the same tick of the kernel's clock
// leaves the same times.
const racy = 50 * time.Millisecond

func openStatCache(root *disk.Root, dir string) *statCache {
	sum := sha256.Sum256([]byte(dir))
	c := &statCache{path: root.Path("buildcache", "stat", hex.EncodeToString(sum[:16])), next: map[string]statEntry{}}
	data, err := os.ReadFile(c.path)
	if err != nil {
		return c // not there: nothing is known
	}
	c.old = decodeStat(data)
	return c
}

func decodeStat(data []byte) map[string]statEntry {
	if len(data) < len(statMagic)+4 || string(data[:len(statMagic)]) != statMagic {
		return nil
	}
	body, sum := data[:len(data)-4], binary.LittleEndian.Uint32(data[len(data)-4:])
	if crc32.ChecksumIEEE(body) != sum {
		return nil
	}
	all := string(body) // one allocation: the keys are pieces of it
	m := make(map[string]statEntry, len(body)/(statFixed+16))
	for at := len(statMagic); at < len(body); {
		if at+2 > len(body) {
			return nil
		}
		n := int(binary.LittleEndian.Uint16(body[at:]))
		end := at + statFixed + n
		if end > len(body) {
			return nil
		}
		name := all[at+2 : at+2+n]
		var e statEntry
		for i := range e.id {
			e.id[i] = binary.LittleEndian.Uint64(body[at+2+n+8*i:])
		}
		copy(e.sum[:], body[end-1-sha256.Size:])
		e.plain = body[end-1] == 1
		m[name] = e
		at = end
	}
	return m
}

func statID(st *unix.Stat_t) [6]uint64 {
	return [6]uint64{st.Dev, st.Ino, uint64(st.Size), uint64(st.Mode), uint64(st.Mtim.Nano()), uint64(st.Ctim.Nano())}
}

// get returns the hash of a file that looks as it did.
func (c *statCache) get(path string, st *unix.Stat_t) (sum [sha256.Size]byte, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.old[path]
	if !ok {
		e, ok = c.next[path]
	}
	if !ok || e.id != statID(st) {
		return sum, false
	}
	c.next[path] = e
	return e.sum, true
}

// plain reports whether a file is known, looks as it did and has no extended attributes. c may be nil.
func (c *statCache) plain(path string, st *unix.Stat_t) bool {
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.old[path]
	return ok && e.plain && e.id == statID(st)
}

// put remembers a hash, read at the time now, unless the file changed so lately that its stat proves nothing.
func (c *statCache) put(path string, st *unix.Stat_t, sum [sha256.Size]byte, plain bool, now time.Time) {
	if now.Sub(time.Unix(st.Ctim.Unix())) < racy || len(path) > 1<<16-1 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next[path] = statEntry{statID(st), sum, plain}
	c.dirty = true
}

// save writes the cache if anything was hashed. What this build did not look at is kept while the file stays in proportion.
func (c *statCache) save() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.dirty {
		return nil
	}
	if len(c.old) < 4*len(c.next)+1000 {
		for p, e := range c.old {
			if _, ok := c.next[p]; !ok {
				c.next[p] = e
			}
		}
	}
	out := []byte(statMagic)
	for _, p := range slices.Sorted(maps.Keys(c.next)) {
		e := c.next[p]
		out = binary.LittleEndian.AppendUint16(out, uint16(len(p)))
		out = append(out, p...)
		for _, v := range e.id {
			out = binary.LittleEndian.AppendUint64(out, v)
		}
		out = append(out, e.sum[:]...)
		if e.plain {
			out = append(out, 1)
		} else {
			out = append(out, 0)
		}
	}
	out = binary.LittleEndian.AppendUint32(out, crc32.ChecksumIEEE(out))
	err := disk.WriteFile(c.path, out, 0o600, disk.Volatile)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(c.path), 0o700); err != nil {
			return fmt.Errorf("stat cache: %w", err)
		}
		err = disk.WriteFile(c.path, out, 0o600, disk.Volatile)
	}
	if err != nil {
		return fmt.Errorf("stat cache: %w", err)
	}
	c.dirty = false
	return nil
}
