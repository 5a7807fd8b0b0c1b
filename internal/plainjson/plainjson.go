// Package plainjson decodes and encodes JSON as encoding/json does, for programs that do it once.
//
// Before encoding/json decodes or encodes a first value it makes plans for the value's type and all that can be reached from it: 0.8 ms for
// the OCI runtime's spec, 0.5 ms for a container's record, whatever little of it is there. This package looks at the types of what is
// there. It understands texts as programs write them. Whatever else it meets, from a name in another case to a mistake, has encoding/json
// decode the whole text, and say what is wrong.
package plainjson

import (
	"encoding"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"
)

// Unmarshal is json.Unmarshal.
func Unmarshal(b []byte, v any) error {
	p := reflect.ValueOf(v)
	if p.Kind() != reflect.Pointer || p.IsNil() || !p.Elem().IsZero() {
		return json.Unmarshal(b, v) // into something, which keeps what the text does not name
	}
	to := reflect.New(p.Type().Elem()).Elem()
	d := decoder{text: b}
	d.space()
	if err := d.value(to, 0); err != nil {
		return json.Unmarshal(b, v)
	}
	if d.space(); d.at != len(b) {
		return json.Unmarshal(b, v)
	}
	p.Elem().Set(to)
	return nil
}

// errOther says that encoding/json has to have a look.
var errOther = errors.New("not plain")

// maxDepth bounds nesting; encoding/json knows what to say of more.
const maxDepth = 200

type decoder struct {
	text []byte
	at   int
}

// known are the types that were met.
var known struct {
	sync.RWMutex
	types map[reflect.Type]*typeInfo
}

// typeInfo is what is known of a type.
type typeInfo struct {
	// own says that it decodes itself, by a method, ownText that it or its address encodes itself.
	own, ownText bool
	// fields are a structure's, in the order of the source. plain is false for one with what this package does not know.
	fields []field
	plain  bool
}

type field struct {
	name  string
	index []int
	// omitEmpty and omitZero are the tag's options.
	omitEmpty, omitZero bool
}

var (
	jsonType = reflect.TypeFor[json.Unmarshaler]()
	textType = reflect.TypeFor[encoding.TextUnmarshaler]()

	toJSONType = reflect.TypeFor[json.Marshaler]()
	toTextType = reflect.TypeFor[encoding.TextMarshaler]()
	zeroType   = reflect.TypeFor[interface{ IsZero() bool }]()
	numberType = reflect.TypeFor[json.Number]()
)

func infoOf(t reflect.Type) *typeInfo {
	known.RLock()
	i, ok := known.types[t]
	known.RUnlock()
	if ok {
		return i
	}
	i = &typeInfo{}
	if t.Name() != "" && t.PkgPath() != "" || t.Kind() == reflect.Struct { // others have no methods
		p := reflect.PointerTo(t)
		i.own = p.Implements(jsonType) || p.Implements(textType)
		i.ownText = p.Implements(toJSONType) || p.Implements(toTextType) // whose methods are p's too
	}
	if t.Kind() == reflect.Struct && !(i.own && i.ownText) {
		i.fields, i.plain = fields(t, nil, nil)
	}
	known.Lock()
	defer known.Unlock()
	if known.types == nil {
		known.types = map[reflect.Type]*typeInfo{}
	}
	known.types[t] = i
	return i
}

// fields appends the fields of a structure, those of embedded ones with them, of which one of the same name nearer to the top takes the
// place; false where encoding/json has more rules for what is meant.
func fields(t reflect.Type, index []int, out []field) ([]field, bool) {
	for i := range t.NumField() {
		f := t.Field(i)
		at := append(index[:len(index):len(index)], i)
		tag := f.Tag.Get("json")
		if tag == "-" || !f.Anonymous && !f.IsExported() {
			continue
		}
		name, options, _ := strings.Cut(tag, ",")
		if f.Anonymous && name == "" {
			if f.Type.Kind() != reflect.Struct {
				return nil, false
			}
			var ok bool
			if out, ok = fields(f.Type, at, out); !ok {
				return nil, false
			}
			continue
		}
		if name == "" {
			name = f.Name
		}
		if f.Anonymous || strings.Contains(options, "string") || strings.ContainsFunc(name, unusual) {
			return nil, false
		}
		hidden := false
		for k := 0; k < len(out); k++ {
			o := out[k]
			switch {
			case o.name == name && len(at) < len(o.index):
				out = slices.Delete(out, k, k+1)
				k--
			case o.name == name && len(at) > len(o.index):
				hidden = true
			case len(o.name) == len(name) && strings.EqualFold(o.name, name): // which one is meant is a matter of tags
				return nil, false
			}
		}
		if hidden {
			continue
		}
		o := field{name: name, index: at}
		for option := range strings.SplitSeq(options, ",") {
			o.omitEmpty = o.omitEmpty || option == "omitempty"
			o.omitZero = o.omitZero || option == "omitzero"
		}
		out = append(out, o)
	}
	return out, true
}

// unusual tells characters in a tag that encoding/json may not take for a name's.
func unusual(c rune) bool {
	return c != '_' && c != '-' && c != '.' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z')
}

// space skips white space.
func (d *decoder) space() {
	for d.at < len(d.text) {
		switch d.text[d.at] {
		case ' ', '\t', '\r', '\n':
			d.at++
		default:
			return
		}
	}
}

// next is the next byte, 0 at the end.
func (d *decoder) next() byte {
	if d.at < len(d.text) {
		return d.text[d.at]
	}
	return 0
}

// take skips white space, one byte that must be c, and white space.
func (d *decoder) take(c byte) bool {
	d.space()
	if d.next() != c {
		return false
	}
	d.at++
	d.space()
	return true
}

// literal skips a word.
func (d *decoder) literal(word string) bool {
	if !strings.HasPrefix(string(d.text[d.at:min(len(d.text), d.at+len(word))]), word) {
		return false
	}
	d.at += len(word)
	return true
}

// value decodes the value that begins here. to is zero.
func (d *decoder) value(to reflect.Value, depth int) error {
	if depth > maxDepth {
		return errOther
	}
	if d.next() == 'n' && d.literal("null") {
		if infoOf(to.Type()).own { // it may want to hear of it
			return errOther
		}
		return nil
	}
	t := to.Type()
	if t.Kind() == reflect.Pointer {
		p := reflect.New(t.Elem())
		to.Set(p)
		return d.value(p.Elem(), depth+1)
	}
	if infoOf(t).own {
		return d.delegate(to)
	}
	switch t.Kind() {
	case reflect.Struct:
		return d.structure(to, depth)
	case reflect.Map:
		if t.Key().Kind() != reflect.String && !reflect.PointerTo(t.Key()).Implements(textType) {
			return d.delegate(to)
		}
		return d.mapping(to, depth)
	case reflect.Array:
		return d.array(to, depth)
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return d.delegate(to)
		}
		return d.slice(to, depth)
	case reflect.String:
		s, err := d.str()
		if err == nil {
			to.SetString(s)
		}
		return err
	case reflect.Bool:
		switch {
		case d.literal("true"):
			to.SetBool(true)
		case !d.literal("false"):
			return errOther
		}
		return nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		n, err := strconv.ParseInt(d.integer(), 10, t.Bits())
		if err == nil {
			to.SetInt(n)
		}
		return err
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		n, err := strconv.ParseUint(d.integer(), 10, t.Bits())
		if err == nil {
			to.SetUint(n)
		}
		return err
	}
	return d.delegate(to)
}

// integer skips a whole number and returns it; what else may follow in a number is found where a comma or an end is expected.
func (d *decoder) integer() string {
	begin := d.at
	if d.next() == '-' {
		d.at++
	}
	first := d.at
	for d.at < len(d.text) && d.text[d.at] >= '0' && d.text[d.at] <= '9' {
		d.at++
	}
	if d.at-first > 1 && d.text[first] == '0' {
		return "" // no number in JSON
	}
	return string(d.text[begin:d.at])
}

// str decodes a string.
func (d *decoder) str() (string, error) {
	if d.next() != '"' {
		return "", errOther
	}
	d.at++
	begin := d.at
	for ; d.at < len(d.text); d.at++ {
		switch c := d.text[d.at]; {
		case c == '"':
			s := string(d.text[begin:d.at])
			d.at++
			if !utf8.ValidString(s) {
				return "", errOther
			}
			return s, nil
		case c == '\\':
			return d.escaped(begin)
		case c < ' ':
			return "", errOther
		}
	}
	return "", errOther
}

// escaped leaves a string with escapes to encoding/json.
func (d *decoder) escaped(begin int) (string, error) {
	for ; d.at < len(d.text); d.at++ {
		switch d.text[d.at] {
		case '\\':
			d.at++
		case '"':
			d.at++
			var s string
			err := json.Unmarshal(d.text[begin-1:d.at], &s)
			return s, err
		}
	}
	return "", errOther
}

// list decodes what stands between two brackets, separated by commas.
func (d *decoder) list(begin, end byte, item func() error) error {
	if d.next() != begin {
		return errOther
	}
	d.at++
	d.space()
	if d.next() == end {
		d.at++
		return nil
	}
	for {
		if err := item(); err != nil {
			return err
		}
		d.space()
		switch d.next() {
		case ',':
			d.at++
			d.space()
		case end:
			d.at++
			return nil
		default:
			return errOther
		}
	}
}

// members decodes an object.
func (d *decoder) members(member func(name string) error) error {
	return d.list('{', '}', func() error {
		name, err := d.str()
		if err == nil && !d.take(':') {
			err = errOther
		}
		if err != nil {
			return err
		}
		return member(name)
	})
}

func (d *decoder) structure(to reflect.Value, depth int) error {
	info := infoOf(to.Type())
	if !info.plain {
		return d.delegate(to)
	}
	var seen [4]uint64
	if len(info.fields) > 64*len(seen) {
		return d.delegate(to)
	}
	return d.members(func(name string) error {
		for i, f := range info.fields {
			if f.name != name {
				continue
			}
			if seen[i/64]&(1<<(i%64)) != 0 {
				return errOther // twice: the second one goes on where the first ended
			}
			seen[i/64] |= 1 << (i % 64)
			return d.value(to.FieldByIndex(f.index), depth+1)
		}
		for _, f := range info.fields {
			if strings.EqualFold(f.name, name) {
				return errOther
			}
		}
		_, err := d.skip()
		return err
	})
}

func (d *decoder) mapping(to reflect.Value, depth int) error {
	t := to.Type()
	to.Set(reflect.MakeMap(t))
	return d.members(func(name string) error {
		key := reflect.New(t.Key()).Elem()
		if text, ok := key.Addr().Interface().(encoding.TextUnmarshaler); !ok {
			key.SetString(name)
		} else if err := text.UnmarshalText([]byte(name)); err != nil {
			return err
		}
		if to.MapIndex(key).IsValid() {
			return errOther
		}
		v := reflect.New(t.Elem()).Elem()
		if err := d.value(v, depth+1); err != nil {
			return err
		}
		to.SetMapIndex(key, v)
		return nil
	})
}

func (d *decoder) slice(to reflect.Value, depth int) error {
	t := to.Type()
	to.Set(reflect.MakeSlice(t, 0, 0))
	return d.list('[', ']', func() error {
		n := to.Len()
		if n == to.Cap() {
			to.Grow(max(4, n))
		}
		to.SetLen(n + 1)
		return d.value(to.Index(n), depth+1)
	})
}

// array fills an array from its begin. One that has no room for all is encoding/json's.
func (d *decoder) array(to reflect.Value, depth int) error {
	n := 0
	return d.list('[', ']', func() error {
		if n == to.Len() {
			return errOther
		}
		n++
		return d.value(to.Index(n-1), depth+1)
	})
}

// delegate has encoding/json decode one value, or the value's own method.
func (d *decoder) delegate(to reflect.Value) error {
	b, err := d.skip()
	if err != nil {
		return err
	}
	if own, ok := to.Addr().Interface().(json.Unmarshaler); ok {
		return own.UnmarshalJSON(b)
	}
	return json.Unmarshal(b, to.Addr().Interface())
}

// skip returns one value that encoding/json can read.
func (d *decoder) skip() ([]byte, error) {
	begin, open := d.at, 0
	for d.at < len(d.text) {
		switch c := d.text[d.at]; c {
		case '{', '[':
			open++
		case '}', ']', ',', ' ', '\t', '\r', '\n':
			if open == 0 {
				return d.valid(begin)
			}
			if c == '}' || c == ']' {
				open--
			}
		case '"':
			for d.at++; d.at < len(d.text) && d.text[d.at] != '"'; d.at++ {
				if d.text[d.at] == '\\' {
					d.at++
				}
			}
		}
		d.at++
		if open == 0 && (d.at > len(d.text) || strings.IndexByte(`}]"`, d.text[d.at-1]) >= 0) {
			break
		}
	}
	return d.valid(begin)
}

func (d *decoder) valid(begin int) ([]byte, error) {
	b := d.text[begin:min(d.at, len(d.text))]
	if !json.Valid(b) {
		return nil, errOther
	}
	return b, nil
}
