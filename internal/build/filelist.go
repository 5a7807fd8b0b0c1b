package build

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// fileLists are buildcache/files/<aa>/<fingerprint>: which files a selection consisted of, so that a later build can name those that
// changed. mtime = last use. A file holds
//
//	magic, then per entry: uvarint bytes shared with the path before, uvarint length of the rest, the rest, uvarint mode, 8 bytes of
//	the content's hash
//
// and is written once. Whatever is odd about it makes it an unknown list. Selections of more than maxListed entries are not listed.
type fileLists struct{ root *disk.Root }

const (
	listMagic = "conex files 1\n"
	maxListed = 50_000
)

// listed is an entry of a list.
type listed struct {
	path string
	mode uint32
	sum  [8]byte
}

func (l fileLists) path(sum string) string { return l.root.Path("buildcache", "files", sum[:2], sum) }

// keep writes the list of a selection whose regular files have these hashes, unless it is there. Nobody needs it but who wants an
// explanation, so what goes wrong is no error: that list will be missing.
func (l fileLists) keep(sum string, sel []source, sums [][sha256.Size]byte) {
	if l.root == nil {
		return
	}
	now := time.Now()
	p := l.path(sum)
	if err := os.Chtimes(p, now, now); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return
	}
	count := 0
	for i := range sel {
		count += len(sel[i].items)
	}
	if count > maxListed {
		return
	}
	b := encodeList(sel, sums)
	if err := disk.WriteFile(p, b, 0o600, disk.Volatile); errors.Is(err, fs.ErrNotExist) && os.MkdirAll(filepath.Dir(p), 0o700) == nil {
		_ = disk.WriteFile(p, b, 0o600, disk.Volatile) // see above
	}
}

func encodeList(sel []source, sums [][sha256.Size]byte) []byte {
	b := []byte(listMagic)
	before := ""
	n := 0
	for i := range sel {
		for k := range sel[i].items {
			it := &sel[i].items[k]
			shared := 0
			for shared < min(len(before), len(it.path)) && before[shared] == it.path[shared] {
				shared++
			}
			b = binary.AppendUvarint(b, uint64(shared))
			b = binary.AppendUvarint(b, uint64(len(it.path)-shared))
			b = append(b, it.path[shared:]...)
			b = binary.AppendUvarint(b, uint64(it.st.Mode))
			if it.kind() == unix.S_IFREG && n < len(sums) {
				b = append(b, sums[n][:8]...)
				n++
			} else {
				h := fnv.New64a()
				h.Write([]byte(it.link)) //nolint:errcheck // never fails
				b = h.Sum(b)
			}
			before = it.path
		}
	}
	return b
}

// read returns a list sorted by path; ok is false when it is not there.
func (l fileLists) read(sum string) (list []listed, ok bool) {
	if ocispec.Validate(ocispec.Digest("sha256:"+sum)) != nil {
		return nil, false
	}
	b, err := os.ReadFile(l.path(sum))
	if err != nil {
		return nil, false
	}
	if list, ok = decodeList(b); !ok {
		return nil, false
	}
	slices.SortStableFunc(list, func(a, b listed) int { return cmp.Compare(a.path, b.path) })
	return slices.CompactFunc(list, func(a, b listed) bool { return a.path == b.path }), true
}

func decodeList(b []byte) (list []listed, ok bool) {
	rest, ok := strings.CutPrefix(string(b), listMagic)
	if !ok {
		return nil, false
	}
	b = []byte(rest)
	number := func() uint64 {
		n, size := binary.Uvarint(b)
		if size <= 0 || n > 1<<32 {
			b, ok = nil, false
			return 0
		}
		b = b[size:]
		return n
	}
	before := ""
	for len(b) > 0 {
		shared, length := number(), number()
		if !ok || shared > uint64(len(before)) || length > uint64(len(b)) || shared+length > 1<<16 || len(list) >= maxListed {
			return nil, false
		}
		e := listed{path: before[:shared] + string(b[:length])}
		b = b[length:]
		e.mode = uint32(number())
		if !ok || len(b) < len(e.sum) {
			return nil, false
		}
		b = b[copy(e.sum[:], b):]
		before = e.path
		list = append(list, e)
	}
	return list, true
}

// compare tells how the files of one fingerprint differ from those of another: the first most of them, and how many more. Folders count
// only for their modes and when nothing else says that they came or went. ok is false when a list is missing.
func (l fileLists) compare(was, is string, most int) (changes []FileChange, more int, ok bool) {
	a, ok1 := l.read(was)
	b, ok2 := l.read(is)
	if !ok1 || !ok2 {
		return nil, 0, false
	}
	var all []FileChange
	add := func(p, change string, dir bool) {
		if dir {
			p += "/"
		}
		all = append(all, FileChange{p, change})
	}
	isDir := func(e listed) bool { return e.mode&unix.S_IFMT == unix.S_IFDIR }
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || len(a) > 0 && a[0].path < b[0].path:
			add(a[0].path, "removed", isDir(a[0]))
			a = a[1:]
		case len(a) == 0 || b[0].path < a[0].path:
			add(b[0].path, "added", isDir(b[0]))
			b = b[1:]
		default:
			switch x, y := a[0], b[0]; {
			case x.mode&unix.S_IFMT != y.mode&unix.S_IFMT:
				add(x.path, "type", false)
			case x.sum != y.sum:
				add(x.path, "changed", false)
			case x.mode != y.mode:
				add(x.path, "mode", isDir(x))
			}
			a, b = a[1:], b[1:]
		}
	}
	// A folder that came or went says nothing that what follows, which is in it, does not say.
	kept := all[:0]
	for i, c := range all {
		if i+1 < len(all) && strings.HasSuffix(c.Path, "/") && all[i+1].Change == c.Change && strings.HasPrefix(all[i+1].Path, c.Path) {
			continue
		}
		kept = append(kept, c)
	}
	all = kept
	if len(all) > most {
		return all[:most], len(all) - most, true
	}
	return all, 0, true
}
