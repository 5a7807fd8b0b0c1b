package build

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/maphash"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

// statCache remembers the hashes of a context folder's files by what stat(2) says of them, so that an unchanged file is not read
// again. One file per context, buildcache/stat/<hash of its path>:
//
//	magic, then per file: u16 length of path, path, 6 × u64 (device, inode, size, mode, mtime, ctime in ns), 32 bytes contentHash,
//	u8 1 when it has no extended attributes;
//	crc32 of all that
//
// Numbers are little-endian. Whatever is odd about the file makes it an empty cache. Two builds of one context at once overwrite
// each other's file, which costs hashing only.
type statCache struct {
	path string
	old  statTable // what earlier builds saw; never changed

	mu   sync.Mutex
	used []bool    // entries of old that this build met
	next statTable // what this build hashed
}

const statMagic = "conex stat cache 3\n"

// statFixed is the length of an entry without its path.
const statFixed = 2 + 48 + sha256.Size + 1

// racy is how old a file's last change must be for its stat to prove anything: a write within the same tick of the kernel's clock
// leaves the same times.
const racy = 50 * time.Millisecond

func openStatCache(root *disk.Root, dir string) *statCache {
	sum := sha256.Sum256([]byte(dir))
	c := &statCache{path: root.Path("buildcache", "stat", hex.EncodeToString(sum[:16]))}
	data, err := os.ReadFile(c.path)
	if err != nil {
		return c // not there: nothing is known
	}
	c.old = decodeStat(data)
	c.used = make([]bool, len(c.old.at))
	return c
}

// statTable is entries as they lie in the file, one after the other, and where to find a path's: a hash table without a pointer for each
// file, since a context may have a million.
type statTable struct {
	data  []byte   // the file's content, without the checksum
	at    []uint32 // where each entry begins
	slots []int32  // 1 + the number of an entry, by the hash of its path; 0 is free
}

// pathSeed makes the hashes of this process.
var pathSeed = sync.OnceValue(maphash.MakeSeed)

// decodeStat reads a file's content. It is kept, not copied.
func decodeStat(data []byte) statTable {
	if len(data) < len(statMagic)+4 || string(data[:len(statMagic)]) != statMagic || len(data) > math.MaxUint32 {
		return statTable{}
	}
	body, sum := data[:len(data)-4], binary.LittleEndian.Uint32(data[len(data)-4:])
	if crc32.ChecksumIEEE(body) != sum {
		return statTable{}
	}
	t := statTable{data: body, at: make([]uint32, 0, len(body)/(statFixed+16))}
	for at := len(statMagic); at < len(body); {
		if at+2 > len(body) {
			return statTable{}
		}
		end := at + statFixed + int(binary.LittleEndian.Uint16(body[at:]))
		if end > len(body) {
			return statTable{}
		}
		t.at = append(t.at, uint32(at))
		at = end
	}
	t.rehash()
	return t
}

// rehash makes room for twice as many slots as there are entries, or more.
func (t *statTable) rehash() {
	n := 64
	for n < 2*len(t.at) {
		n *= 2
	}
	t.slots = make([]int32, n)
	for k := range t.at {
		path := t.name(k)
		i := int(maphash.Bytes(pathSeed(), path)) & (n - 1)
		for t.slots[i] != 0 && string(t.name(int(t.slots[i]-1))) != string(path) {
			i = (i + 1) & (n - 1)
		}
		t.slots[i] = int32(k + 1) // the last of two with one path
	}
}

func (t *statTable) name(k int) []byte {
	at := t.at[k]
	return t.data[at+2 : at+2+uint32(binary.LittleEndian.Uint16(t.data[at:]))]
}

// entry is the whole of entry k.
func (t *statTable) entry(k int) []byte {
	at := t.at[k]
	return t.data[at : at+statFixed+uint32(binary.LittleEndian.Uint16(t.data[at:]))]
}

// find returns the number of the entry of a file that looks as it did, or -1.
func (t *statTable) find(path string, id [6]uint64) int {
	if len(t.at) == 0 {
		return -1
	}
	mask := len(t.slots) - 1
	for i := int(maphash.String(pathSeed(), path)) & mask; t.slots[i] != 0; i = (i + 1) & mask {
		k := int(t.slots[i] - 1)
		if name := t.name(k); string(name) == path {
			rest := t.data[int(t.at[k])+2+len(name):]
			for j, v := range id {
				if binary.LittleEndian.Uint64(rest[8*j:]) != v {
					return -1
				}
			}
			return k
		}
	}
	return -1
}

// sum is the hash in entry k.
func (t *statTable) sum(k int) [sha256.Size]byte {
	e := t.entry(k)
	return [sha256.Size]byte(e[len(e)-1-sha256.Size:])
}

// plain says that the file of entry k has no extended attributes; setting one would have changed its ctime.
func (t *statTable) plain(k int) bool {
	e := t.entry(k)
	return e[len(e)-1] == 1
}

// add appends an entry.
func (t *statTable) add(path string, id [6]uint64, sum [sha256.Size]byte, plain bool) {
	if len(t.data) == 0 {
		t.data = append(t.data, statMagic...)
	}
	t.at = append(t.at, uint32(len(t.data)))
	t.data = binary.LittleEndian.AppendUint16(t.data, uint16(len(path)))
	t.data = append(t.data, path...)
	for _, v := range id {
		t.data = binary.LittleEndian.AppendUint64(t.data, v)
	}
	t.data = append(t.data, sum[:]...)
	if plain {
		t.data = append(t.data, 1)
	} else {
		t.data = append(t.data, 0)
	}
	if len(t.slots) < 2*len(t.at) {
		t.rehash()
		return
	}
	mask := len(t.slots) - 1
	i := int(maphash.String(pathSeed(), path)) & mask
	for t.slots[i] != 0 && string(t.name(int(t.slots[i]-1))) != path {
		i = (i + 1) & mask
	}
	t.slots[i] = int32(len(t.at))
}

func statID(st *fileStat) [6]uint64 {
	return [6]uint64{st.Dev, st.Ino, uint64(st.Size), uint64(st.Mode), uint64(st.Mtim), uint64(st.Ctim)}
}

// seen looks a file up among those of earlier builds: known is 1 + its entry's number, 0 if it is new or looks otherwise; plain says that
// it has no extended attributes. c may be nil.
func (c *statCache) seen(path string, st *fileStat) (known int32, plain bool) {
	if c == nil {
		return 0, false
	}
	k := c.old.find(path, statID(st))
	return int32(k + 1), k >= 0 && c.old.plain(k)
}

// get returns the hash of a file: the one that seen has found, or one of this build.
func (c *statCache) get(it *item) (sum [sha256.Size]byte, ok bool) {
	if it.known > 0 {
		c.used[it.known-1] = true
		return c.old.sum(int(it.known - 1)), true
	}
	if k := c.next.find(it.path, statID(&it.st)); k >= 0 {
		return c.next.sum(k), true
	}
	return sum, false
}

// gets is get for several files, nil for those that are not known.
func (c *statCache) gets(items []*item, sums [][sha256.Size]byte) (unknown []int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, it := range items {
		var ok bool
		if sums[i], ok = c.get(it); !ok {
			unknown = append(unknown, i)
		}
	}
	return unknown
}

// put remembers a hash, read at the time now, unless the file changed so lately that its stat proves nothing.
func (c *statCache) put(path string, st *fileStat, sum [sha256.Size]byte, plain bool, now time.Time) {
	if now.Sub(time.Unix(0, st.Ctim)) < racy || len(path) > 1<<16-1 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.next.data)+statFixed+len(path) < math.MaxUint32-len(statMagic) {
		c.next.add(path, statID(st), sum, plain)
	}
}

// save writes the cache if anything was hashed. What this build did not look at is kept while the file stays in proportion.
func (c *statCache) save() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.next.at) == 0 {
		return nil
	}
	used := 0
	for _, u := range c.used {
		if u {
			used++
		}
	}
	all := len(c.old.at) < 4*(used+len(c.next.at))+1000
	out := c.next.data
	for k := range c.old.at {
		if !all && !c.used[k] || c.next.has(c.old.name(k)) {
			continue
		}
		out = append(out, c.old.entry(k)...)
	}
	c.next = statTable{}
	if len(out)+4 > math.MaxUint32 {
		return nil // nobody could read it
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
	return nil
}

// has reports whether there is an entry for a path.
func (t *statTable) has(path []byte) bool {
	if len(t.at) == 0 {
		return false
	}
	mask := len(t.slots) - 1
	for i := int(maphash.Bytes(pathSeed(), path)) & mask; t.slots[i] != 0; i = (i + 1) & mask {
		if string(t.name(int(t.slots[i]-1))) == string(path) {
			return true
		}
	}
	return false
}

// fileStat is what matters of stat(2), in half the space.
type fileStat struct {
	Dev, Ino, Rdev uint64
	Size           int64
	Mtim, Ctim     int64 // nanoseconds since 1970
	Mode, Uid, Gid uint32
	Nlink          uint32
}

func statOf(st *unix.Stat_t) fileStat {
	return fileStat{
		Dev: st.Dev, Ino: st.Ino, Rdev: st.Rdev, Size: st.Size, Mtim: st.Mtim.Nano(), Ctim: st.Ctim.Nano(), Mode: st.Mode, Uid: st.Uid, Gid: st.Gid,
		Nlink: uint32(min(uint64(st.Nlink), math.MaxUint32)),
	}
}

// mtime is the file's modification time.
func (st *fileStat) mtime() time.Time { return time.Unix(0, st.Mtim) }
