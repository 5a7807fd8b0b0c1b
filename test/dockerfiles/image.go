package dockerfiles

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

// Image is an image as an archive holds it: its config, and its files as a container sees them.
type Image struct {
	Config map[string]any
	tree   tree
	layers []layer
}

type layer struct {
	diffID string
	data   []byte
}

// file is what a path leads to. Hard links share one.
type file struct {
	hdr  tar.Header
	size int64
	text string // of content: quoted if short, else its hash
}

// tree is files by their clean absolute path.
type tree map[string]*file

// ReadArchive reads the only image of an OCI archive.
func ReadArchive(r io.Reader) (*Image, error) {
	blobs := map[string][]byte{}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return nil, err
		}
		blobs[path.Clean(h.Name)] = data
	}
	type descriptor struct {
		MediaType string
		Digest    string
		Platform  struct{ OS string }
	}
	blob := func(d descriptor) ([]byte, error) {
		b, ok := blobs["blobs/"+strings.Replace(d.Digest, ":", "/", 1)]
		if !ok {
			return nil, fmt.Errorf("archive: %s is missing", d.Digest)
		}
		return b, nil
	}
	var doc struct {
		Manifests []descriptor
		Config    descriptor
		Layers    []descriptor
	}
	next := blobs["index.json"]
	for len(doc.Layers) == 0 && doc.Config.Digest == "" {
		doc.Manifests = nil
		if err := json.Unmarshal(next, &doc); err != nil {
			return nil, fmt.Errorf("archive: %w", err)
		}
		if doc.Config.Digest != "" {
			break
		}
		if len(doc.Manifests) == 0 {
			return nil, errors.New("archive: no image")
		}
		var err error
		if next, err = blob(doc.Manifests[0]); err != nil {
			return nil, err
		}
	}
	raw, err := blob(doc.Config)
	if err != nil {
		return nil, err
	}
	img := &Image{tree: tree{}}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&img.Config); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	for _, l := range doc.Layers {
		data, err := blob(l)
		if err != nil {
			return nil, err
		}
		lay, err := readLayer(l.Digest, data)
		if err != nil {
			return nil, err
		}
		img.layers = append(img.layers, lay)
		if err := img.tree.apply(lay.data); err != nil {
			return nil, err
		}
	}
	return img, nil
}

// layersRead are layers by the digest of their blobs: all images share the base's.
var layersRead sync.Map

func readLayer(digest string, data []byte) (layer, error) {
	if l, ok := layersRead.Load(digest); ok {
		return l.(layer), nil
	}
	if bytes.HasPrefix(data, []byte{0x1f, 0x8b}) {
		zr, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			return layer{}, err
		}
		if data, err = io.ReadAll(zr); err != nil {
			return layer{}, err
		}
	}
	sum := sha256.Sum256(data)
	l := layer{"sha256:" + hex.EncodeToString(sum[:]), data}
	layersRead.Store(digest, l)
	return l, nil
}

// apply puts a layer on top, whiteouts taken as the image specification has them.
func (t tree) apply(layer []byte) error {
	below := t.clone()
	tr := tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("layer: %w", err)
		}
		name := path.Join("/", h.Name)
		dir, base := path.Split(name)
		dir = path.Clean(dir)
		if base == ".wh..wh..opq" {
			for p := range below {
				if strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/") && t[p] == below[p] {
					delete(t, p)
				}
			}
			continue
		}
		if gone, ok := strings.CutPrefix(base, ".wh."); ok {
			t.remove(path.Join(dir, gone))
			continue
		}
		for d := dir; d != "/" && t[d] == nil; d = path.Dir(d) {
			t[d] = &file{hdr: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Now()}}
		}
		if h.Typeflag == tar.TypeLink {
			f := t[path.Join("/", h.Linkname)]
			if f == nil {
				return fmt.Errorf("layer: %s is a link to %s, which is missing", name, h.Linkname)
			}
			t.remove(name)
			t[name] = f
			continue
		}
		f := &file{hdr: *h, size: h.Size}
		if h.Typeflag == tar.TypeReg {
			data, err := io.ReadAll(tr)
			if err != nil {
				return fmt.Errorf("layer: %s: %w", name, err)
			}
			f.text = content(data)
		}
		if old := t[name]; old != nil && (old.hdr.Typeflag != tar.TypeDir || h.Typeflag != tar.TypeDir) {
			t.remove(name)
		}
		t[name] = f
	}
}

func (t tree) clone() tree {
	c := make(tree, len(t))
	for k, v := range t {
		c[k] = v
	}
	return c
}

func (t tree) remove(name string) {
	delete(t, name)
	for p := range t {
		if strings.HasPrefix(p, name+"/") {
			delete(t, p)
		}
	}
}

// content shows short text as it is, anything else by its hash.
func content(data []byte) string {
	if q := fmt.Sprintf("%q", data); len(q) <= 90 && !strings.Contains(q, `\x`) {
		return q
	}
	sum := sha256.Sum256(data)
	return fmt.Sprintf("%d bytes, sha256 %s", len(data), hex.EncodeToString(sum[:8]))
}

// recent is younger than every time that a case gives: from then on it is the build's own, which differs by nature and is left out.
var recent = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

// Render describes the case's image in lines: its config, its history and its files, without what it has from base. A folder has its
// time only where the case says "% foldertimes": BuildKit gives a folder of the context its own or that of the moment, as chance has it.
func (c *Case) Render(img, base *Image) ([]string, error) {
	var out []string
	below, inherited := tree{}, 0
	if base != nil && len(img.layers) >= len(base.layers) && slices.EqualFunc(img.layers[:len(base.layers)], base.layers, func(a, b layer) bool { return a.diffID == b.diffID }) {
		below, inherited = base.tree, len(list(base.Config["history"]))
	}
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, k := range []string{"architecture", "os", "variant", "author"} {
		if v, ok := img.Config[k]; ok {
			add("%s %v", k, v)
		}
	}
	if s, ok := img.Config["created"].(string); ok && (base == nil || s != base.Config["created"]) {
		at, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			return nil, err
		}
		if at.Before(recent) {
			add("created %s", at.UTC().Format(time.RFC3339Nano))
		}
	}
	conf, _ := img.Config["config"].(map[string]any) //nolint:errcheck // an absent one has nothing
	for _, k := range sorted(conf) {
		switch v := conf[k].(type) {
		case nil:
		case []any:
			if k == "Env" || k == "OnBuild" {
				for _, e := range v {
					add("%s %q", k, e)
				}
			} else {
				add("%s %s", k, compact(v))
			}
		case map[string]any:
			switch k {
			case "Labels":
				for _, l := range sorted(v) {
					add("Label %q=%q", l, v[l])
				}
			case "ExposedPorts", "Volumes":
				for _, l := range sorted(v) {
					add("%s %q", k, l)
				}
			default:
				add("%s %s", k, compact(v))
			}
		default:
			add("%s %v", k, v)
		}
	}
	for _, h := range list(img.Config["history"])[inherited:] {
		m, _ := h.(map[string]any) //nolint:errcheck // anything else has no words
		line := fmt.Sprintf("history %q", strings.TrimSuffix(fmt.Sprint(m["created_by"]), " # buildkit"))
		if m["empty_layer"] == true {
			line += " empty"
		}
		if a, ok := m["author"]; ok {
			line += fmt.Sprintf(" author=%q", a)
		}
		out = append(out, line)
	}
	return append(out, img.tree.render(below, slices.Contains(c.setup, "foldertimes"))...), nil
}

func (t tree) render(below tree, folders bool) []string {
	var out []string
	first := map[*file]string{}
	for _, p := range sorted(t) {
		f := t[p]
		if one, ok := first[f]; ok {
			if below[p] == nil || f != below[p] {
				out = append(out, fmt.Sprintf("%s same as %s", show(p), show(one)))
			}
			continue
		}
		first[f] = p
		line := f.render(below[p], folders)
		if old := below[p]; old != nil && (old == f || stripTime(old.render(old, folders)) == stripTime(line) && (f.hdr.ModTime.Equal(old.hdr.ModTime) || !f.timed(folders))) {
			continue
		}
		if p == "/" {
			continue // the root's own entry says nothing that a container shows differently
		}
		out = append(out, show(p)+" "+line)
	}
	for _, p := range sorted(below) {
		if t[p] == nil && (path.Dir(p) == "/" || t[path.Dir(p)] != nil) {
			out = append(out, show(p)+" gone")
		}
	}
	return out
}

// timed reports whether the time is of interest.
func (f *file) timed(folders bool) bool {
	return f.hdr.ModTime.Before(recent) && (folders || f.hdr.Typeflag != tar.TypeDir)
}

func (f *file) render(old *file, folders bool) string {
	h := &f.hdr
	kind := map[byte]string{tar.TypeReg: "file", tar.TypeDir: "dir", tar.TypeSymlink: "symlink", tar.TypeFifo: "fifo", tar.TypeChar: "char", tar.TypeBlock: "block"}[h.Typeflag]
	s := fmt.Sprintf("%s %04o %d:%d", kind, h.Mode&0o7777, h.Uid, h.Gid)
	switch {
	case !folders && h.Typeflag == tar.TypeDir:
	case old != nil && old.hdr.ModTime.Equal(h.ModTime):
		s += " @base"
	case f.timed(folders):
		s += " @" + h.ModTime.UTC().Format(time.RFC3339Nano)
	}
	switch h.Typeflag {
	case tar.TypeReg:
		s += " " + f.text
	case tar.TypeSymlink:
		s += fmt.Sprintf(" -> %q", h.Linkname)
	case tar.TypeChar, tar.TypeBlock:
		s += fmt.Sprintf(" %d,%d", h.Devmajor, h.Devminor)
	}
	for _, k := range sorted(h.PAXRecords) {
		if x, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			s += fmt.Sprintf(" %s=%q", x, h.PAXRecords[k])
		}
	}
	return s
}

// show quotes a path that needs it.
func show(p string) string {
	if q := fmt.Sprintf("%q", p); q != `"`+p+`"` || strings.Contains(p, " ") {
		return q
	}
	return p
}

// withoutTime is a line without its time, if it is one of a file.
func withoutTime(line string) string {
	if !strings.HasPrefix(line, "/") && !strings.HasPrefix(line, `"/`) {
		return line
	}
	return stripTime(line)
}

func stripTime(s string) string {
	before, after, ok := strings.Cut(s, " @")
	if !ok {
		return s
	}
	if i := strings.IndexByte(after, ' '); i >= 0 {
		return before + after[i:]
	}
	return before
}

// Agree returns what two descriptions of one image have in common: a time that differs is left out, anything else that does is an error.
func Agree(a, b []string) ([]string, error) {
	if len(a) != len(b) {
		return nil, fmt.Errorf("two builds differ:\n%s\nand\n%s", strings.Join(a, "\n"), strings.Join(b, "\n"))
	}
	out := slices.Clone(a)
	for i := range out {
		if a[i] == b[i] {
			continue
		}
		if out[i] = withoutTime(a[i]); out[i] != withoutTime(b[i]) {
			return nil, fmt.Errorf("two builds differ:\n%s\nand\n%s", a[i], b[i])
		}
	}
	return out, nil
}

// Compare says how got differs from want, "" when it does not. A time that want does not name may be any.
func Compare(want, got []string) string {
	timed := map[string]bool{}
	created := false
	for _, l := range want {
		timed[l] = true
		created = created || strings.HasPrefix(l, "created ")
	}
	var have []string
	for _, l := range got {
		if !timed[l] && timed[withoutTime(l)] {
			l = withoutTime(l)
		}
		if strings.HasPrefix(l, "created ") && !created {
			continue
		}
		have = append(have, l)
	}
	var out []string
	for _, l := range want {
		if i := slices.Index(have, l); i >= 0 {
			continue
		}
		out = append(out, "- "+l)
	}
	for _, l := range have {
		if !timed[l] {
			out = append(out, "+ "+l)
		}
	}
	// Files have no order, variables and history do.
	isFile := func(l string) bool { return strings.HasPrefix(l, "/") || strings.HasPrefix(l, `"/`) }
	a, b := slices.DeleteFunc(slices.Clone(want), isFile), slices.DeleteFunc(have, isFile)
	if len(out) == 0 && !slices.Equal(a, b) {
		out = append(out, "the order of lines differs:")
		out = append(out, b...)
	}
	return strings.Join(out, "\n")
}

func list(v any) []any {
	l, _ := v.([]any) //nolint:errcheck // an absent list is empty
	return l
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func compact(v any) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err.Error()
	}
	return strings.TrimSpace(b.String())
}
