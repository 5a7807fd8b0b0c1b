package analyze

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"time"
	"unicode/utf8"

	"conex/internal/layertar"
)

// ReportSchema is the version of the JSON that WriteJSON writes. Fields may be added within a version, none goes and none changes its meaning.
const ReportSchema = 1

// The JSON form of an Image, without the files.
type (
	reportHead struct {
		Schema     int         `json:"schema"`
		Image      reportImage `json:"image"`
		Efficiency float64     `json:"efficiency"`
		// PathEfficiency is the score by dive's definition.
		PathEfficiency float64 `json:"pathEfficiency"`
		Size           int64   `json:"size"`
		Wasted         int64   `json:"wasted"`
	}
	reportImage struct {
		ID       string   `json:"id"`
		Tags     []string `json:"tags"`
		Created  string   `json:"created,omitempty"`
		Platform string   `json:"platform"`
	}
	reportLayer struct {
		Index       int      `json:"index"`
		Digest      string   `json:"digest"`
		Instruction string   `json:"instruction"`
		CreatedBy   string   `json:"createdBy"`
		Created     string   `json:"created,omitempty"`
		Comment     string   `json:"comment,omitempty"`
		Size        int64    `json:"size"`
		TarSize     int64    `json:"tarSize"`
		Entries     int      `json:"entries"`
		Added       int      `json:"added"`
		Changed     int      `json:"changed"`
		Removed     int      `json:"removed"`
		Wasted      int64    `json:"wasted"`
		Hides       int64    `json:"hides"`
		SharedWith  []string `json:"sharedWith"`
	}
	reportWaste struct {
		reportPath
		Copies  int   `json:"copies"`
		Bytes   int64 `json:"bytes"`
		Layers  []int `json:"layers"`
		Deleted bool  `json:"deleted"`
	}
	// reportPath is a path, and its bytes if JSON can't hold it: names need not be UTF-8.
	reportPath struct {
		Path   string `json:"path"`
		Base64 string `json:"pathBase64,omitempty"`
	}
	reportFile struct {
		reportPath
		Change Change `json:"change"`
		*reportState
		HardLink string `json:"hardLinkTo,omitempty"`
	}
	// reportState is what a file is, its contents aside.
	reportState struct {
		Type       string            `json:"type"`
		Mode       string            `json:"mode"`
		UID        uint32            `json:"uid"`
		GID        uint32            `json:"gid"`
		Size       int64             `json:"size"`
		ModTime    string            `json:"modTime"`
		LinkTarget string            `json:"linkTarget,omitempty"`
		Device     string            `json:"device,omitempty"`
		Xattrs     map[string][]byte `json:"xattrs,omitempty"`
	}
)

func pathOf(p string) reportPath {
	r := reportPath{Path: "/" + p}
	if !utf8.ValidString(p) {
		r.Base64 = base64.StdEncoding.EncodeToString([]byte(r.Path))
	}
	return r
}

func timeOf(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// WriteJSON writes everything known about the image: one object with the keys of schema 1, the lists "layers" (base first) and "waste" (worst
// first) in it, and in each layer "files": what it added, changed and removed. It is written as it goes, so that a big image takes no memory
// for its text.
func (i *Image) WriteJSON(w io.Writer) error {
	j := newJSONWriter(w)
	tags := i.Tags
	if tags == nil {
		tags = []string{}
	}
	j.open(reportHead{ReportSchema, reportImage{string(i.ID), tags, timeOf(i.Created), i.Platform}, i.Efficiency(), i.PathEfficiency(), i.Size, i.Wasted})
	j.raw(`,"layers":[`)
	for k, l := range i.Layers {
		if k > 0 {
			j.raw(",")
		}
		r := reportLayer{k, string(l.DiffID), Instruction(l.CreatedBy), l.CreatedBy, timeOf(l.Created), l.Comment, l.Size, l.TarSize, l.Entries,
			l.Added, l.Changed, l.Removed, l.Wasted, l.Hides, l.SharedWith}
		if r.SharedWith == nil {
			r.SharedWith = []string{}
		}
		j.open(r)
		j.raw(`,"files":[`)
		first := true
		i.EachChange(k, func(n *Node, c Change) {
			if j.err != nil {
				return
			}
			if !first {
				j.raw(",")
			}
			first = false
			j.raw("\n")
			j.value(fileOf(n, c, n.Shown(k)))
		})
		j.raw("]}")
	}
	j.raw(`],"waste":[`)
	for k, x := range i.Waste {
		if k > 0 {
			j.raw(",")
		}
		j.raw("\n")
		j.value(reportWaste{pathOf(x.Path), x.Copies, x.Bytes, x.Layers, x.Deleted})
	}
	j.raw("]}\n")
	return j.flush()
}

// EachChange calls fn for every path that a layer added, changed or removed, a folder before what is in it, in the order of names.
func (i *Image) EachChange(layer int, fn func(*Node, Change)) {
	var walk func(n *Node)
	walk = func(n *Node) {
		for _, c := range n.children {
			if ch := c.Change(layer); ch != Unchanged {
				fn(c, ch)
			}
			walk(c)
		}
	}
	walk(i.root)
}

func fileOf(n *Node, c Change, s *State) reportFile {
	f := reportFile{reportPath: pathOf(n.Path()), Change: c, reportState: stateOf(s)}
	if first := s.FirstName(); first != nil && first != n {
		f.HardLink = "/" + first.Path()
	}
	return f
}

func stateOf(s *State) *reportState {
	if s == nil {
		return nil
	}
	r := &reportState{Type: s.Type(), Mode: fmt.Sprintf("%04o", s.Mode&0o7777), UID: s.UID, GID: s.GID, Size: s.Size,
		ModTime: timeOf(time.Unix(0, s.ModTime)), LinkTarget: s.Target, Xattrs: xattrsOf(s.Xattrs)}
	if r.Type == "char" || r.Type == "block" {
		r.Device = fmt.Sprintf("%d:%d", s.Major, s.Minor)
	}
	return r
}

func xattrsOf(list []layertar.Xattr) map[string][]byte {
	if len(list) == 0 {
		return nil
	}
	m := map[string][]byte{}
	for _, x := range list {
		m[x.Name] = []byte(x.Value)
	}
	return m
}

// jsonWriter writes pieces of JSON and keeps the first error.
type jsonWriter struct {
	w   *bufio.Writer
	err error
}

func newJSONWriter(w io.Writer) *jsonWriter { return &jsonWriter{w: bufio.NewWriterSize(w, 64<<10)} }

func (j *jsonWriter) flush() error {
	if j.err != nil {
		return j.err
	}
	return j.w.Flush()
}

func (j *jsonWriter) raw(s string) {
	if j.err == nil {
		_, j.err = j.w.WriteString(s)
	}
}

func (j *jsonWriter) value(v any) {
	if j.err != nil {
		return
	}
	var b []byte
	if b, j.err = json.Marshal(v); j.err == nil {
		_, j.err = j.w.Write(b)
	}
}

// open writes an object but for its last brace.
func (j *jsonWriter) open(v any) {
	if j.err != nil {
		return
	}
	var b []byte
	if b, j.err = json.Marshal(v); j.err == nil {
		_, j.err = j.w.Write(b[:len(b)-1])
	}
}
