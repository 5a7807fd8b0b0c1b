package engine

import (
	"encoding/csv"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"conex/internal/compress"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

// Types of a build's outputs.
const (
	OutputImage    = "image"  // into the image store, and with push=true to the registries of its names
	OutputDocker   = "docker" // an archive that docker load takes; without dest the image store
	OutputOCI      = "oci"    // an OCI layout, as a tar or with tar=false a folder
	OutputLocal    = "local"  // the file system as a folder
	OutputTar      = "tar"    // the file system as a tar
	OutputNothing  = "cacheonly"
	outputRegistry = "registry" // short for image with push=true
)

// BuildOutput is one --output of a build.
type BuildOutput struct {
	Type string
	// Dest is a file or folder, "-" for standard output.
	Dest string
	// Names are the references that the output gives to the image.
	Names []image.Reference

	// Push sends the image to the registries of Names, ByDigest without a tag. NoStore keeps it out of the image store.
	Push, ByDigest, NoStore bool
	// Canonical adds the names by digest to what is reported; Dangling names an image, which has no name if IfUnnamed is set, by its digest.
	Canonical, IfUnnamed bool
	Dangling             string
	// Compression is that of the layers which the build made, and with Force of all; Packed says that the output asks for one.
	Compression compress.Kind
	Level       *int
	Force       bool
	Packed      bool
	// DockerTypes are Docker's media types instead of OCI's.
	DockerTypes bool
	// Rewrite sets times in the build's layers that are later than SOURCE_DATE_EPOCH to it.
	Rewrite bool
	// Folder is tar=false. Mirror is mode=delete: what the folder has beside the result goes. Source is src, a part of the result.
	Folder, Mirror bool
	Source         string
	// Annotations of the manifest, and of its descriptor where an index names it.
	Annotations, DescriptorAnnotations map[string]string
}

// fields reads the comma-separated fields of an option, in CSV's quoting, as Docker does.
func fields(s string) ([]string, error) {
	r := csv.NewReader(strings.NewReader(s))
	list, err := r.Read()
	if err != nil {
		return nil, fmt.Errorf("%q is no list of key=value: %w", s, err)
	}
	return list, nil
}

// ParseBuildOutput reads --output in the grammar of Docker's buildx: type=TYPE,key=value..., a folder alone, or "-" for a tar on standard
// output.
func ParseBuildOutput(s string) (BuildOutput, error) {
	o := BuildOutput{Compression: compress.Gzip}
	list, err := fields(s)
	if err != nil {
		return o, &kindError{ErrInvalid, err}
	}
	if len(list) == 1 && list[0] == s && !strings.HasPrefix(s, "type=") {
		o.Type, o.Dest = OutputLocal, s
		if s == "-" {
			o.Type = OutputTar
		}
		return o, nil
	}
	attrs := map[string]string{}
	var order []string
	for _, f := range list {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			return o, invalid("invalid value %s", f)
		}
		if k = strings.TrimSpace(strings.ToLower(k)); !slices.Contains(order, k) {
			order = append(order, k)
		}
		attrs[k] = v
	}
	o.Type = attrs["type"]
	if o.Type == "" {
		return o, invalid("type is required for output")
	}
	if o.Type == outputRegistry {
		o.Type = OutputImage
		if _, ok := attrs["push"]; !ok {
			o.Push = true
		}
	}
	for _, k := range order {
		if err := o.set(k, attrs[k]); err != nil {
			return o, err
		}
	}
	return o, o.check()
}

// attrOf says which attributes belong to which types.
var attrOf = map[string][]string{
	"push": {OutputImage}, "push-by-digest": {OutputImage}, "store": {OutputImage}, "unpack": {OutputImage}, "name-canonical": {OutputImage},
	"dangling-name-prefix": {OutputImage}, "danging-name-empty-only": {OutputImage}, "name": imageTypes, "compression": imageTypes, "compression-level": imageTypes,
	"force-compression": imageTypes, "oci-mediatypes": imageTypes, "rewrite-timestamp": imageTypes, "annotation": imageTypes, "tar": {OutputOCI},
	"mode": {OutputLocal}, "src": {OutputLocal, OutputTar}, "dest": {OutputLocal, OutputTar, OutputOCI, OutputDocker}, "type": nil,
}

var imageTypes = []string{OutputImage, OutputDocker, OutputOCI}

// refusedAttrs are BuildKit's attributes that conex has no use for, with the reason.
var refusedAttrs = map[string]string{
	"registry.insecure":      "say insecure = true for the registry in config.toml",
	"oci-artifact":           "conex makes no attestations",
	"attestation-inline":     "conex makes no attestations",
	"attestation-prefix":     "conex makes no attestations",
	"prefer-nondist-layers":  "all layers are distributable",
	"platform-split":         "one platform is built at a time",
	"buildinfo":              "conex adds no build info to images",
	"buildinfo-attrs":        "conex adds no build info to images",
	"context":                "there is no other Docker to load the image into",
	"containerd-snapshotter": "there is no containerd",
}

// set takes one attribute.
func (o *BuildOutput) set(key, value string) (err error) {
	name, rest, _ := strings.Cut(key, ".")
	base := name
	if i := strings.IndexByte(base, '['); i > 0 {
		base = base[:i]
	}
	if strings.HasPrefix(base, "annotation-") || base == "annotation" {
		if !slices.Contains(imageTypes, o.Type) {
			return invalid("output type=%s has no %s", o.Type, key)
		}
		return o.annotate(strings.TrimPrefix(strings.TrimPrefix(name, "annotation"), "-"), rest, value)
	}
	if why, ok := refusedAttrs[key]; ok {
		return invalid("output attribute %s is refused: %s", key, why)
	}
	if key == "source-date-epoch" {
		return invalid("output attribute %s is refused: give --build-arg SOURCE_DATE_EPOCH=%s", key, value)
	}
	types, ok := attrOf[key]
	if !ok {
		return invalid("output attribute %s is not known", key)
	}
	if types != nil && !slices.Contains(types, o.Type) && !(key == "dest" && o.Type == OutputNothing) {
		return invalid("output type=%s has no attribute %s", o.Type, key)
	}
	flag := func(b *bool, whenTrue bool) {
		on := true
		if value != "" {
			if on, err = strconv.ParseBool(value); err != nil {
				err = invalid("non-bool value specified for %s: %s", key, value)
				return
			}
		}
		*b = on == whenTrue
	}
	unused := false
	switch key {
	case "dest":
		o.Dest = value
	case "name":
		return o.name(value)
	case "push":
		flag(&o.Push, true)
	case "push-by-digest":
		flag(&o.ByDigest, true)
	case "store":
		flag(&o.NoStore, false)
	case "unpack": // layers need no unpacking here
		flag(&unused, true)
	case "name-canonical":
		flag(&o.Canonical, true)
	case "dangling-name-prefix":
		if _, err := image.ParseReference(value); err != nil {
			return &kindError{ErrInvalid, fmt.Errorf("dangling-name-prefix %q: %w", value, err)}
		}
		o.Dangling = value
	case "danging-name-empty-only": // BuildKit's spelling
		flag(&o.IfUnnamed, true)
	case "compression":
		if value == "estargz" {
			return invalid("compression=estargz is refused: conex runs images from indexed layers without it; use gzip or zstd")
		}
		o.Packed = true
		if o.Compression, err = compress.ParseKind(value); err != nil {
			return invalid("unsupported compression type %s: use uncompressed, gzip or zstd", value)
		}
	case "compression-level":
		n, err := strconv.Atoi(value)
		if err != nil {
			return invalid("non-integer value %s specified for compression-level", value)
		}
		o.Level, o.Packed = &n, true
	case "force-compression":
		flag(&o.Force, true)
		o.Packed = o.Packed || o.Force
	case "oci-mediatypes":
		flag(&o.DockerTypes, false)
		o.Packed = o.Packed || o.DockerTypes
	case "rewrite-timestamp":
		flag(&o.Rewrite, true)
	case "tar":
		flag(&o.Folder, false)
	case "mode":
		switch strings.ToLower(strings.TrimSpace(value)) {
		case "", "copy":
		case "delete":
			o.Mirror = true
		default:
			return invalid("invalid local exporter mode %q", value)
		}
	case "src":
		if o.Source = value; value == "" {
			return invalid("empty value for src; omit it to export the entire filesystem")
		}
	}
	return err
}

func (o *BuildOutput) name(list string) error {
	for _, n := range strings.Split(list, ",") {
		if n == "" || n == "*" {
			continue
		}
		ref, err := image.ParseReference(n)
		if err != nil {
			return &kindError{ErrInvalid, fmt.Errorf("invalid name %q: %w", n, err)}
		}
		if ref.Digest() != "" {
			return invalid("invalid name %q: refusing to create a tag with a digest reference", n)
		}
		o.Names = append(o.Names, ref)
	}
	return nil
}

// annotate adds an annotation; where is manifest ("" means it too), manifest-descriptor, index or index-descriptor, with a platform in
// brackets or none.
func (o *BuildOutput) annotate(where, key, value string) error {
	if i := strings.IndexByte(where, '['); i >= 0 {
		plat, ok := strings.CutSuffix(where[i+1:], "]")
		if _, err := registry.ParsePlatform(plat); err != nil || !ok || plat == "" {
			return invalid("invalid annotation type %q, expected type and optional platform in square brackets", where)
		}
		where = where[:i]
	}
	if key == "" {
		return invalid("an annotation needs a key")
	}
	m := &o.Annotations
	switch where {
	case "", "manifest":
	case "manifest-descriptor":
		m = &o.DescriptorAnnotations
	case "index", "index-descriptor":
		return invalid("index annotations not supported for single platform export")
	default:
		return invalid("unknown annotation type %q", where)
	}
	if *m == nil {
		*m = map[string]string{}
	}
	(*m)[key] = value
	return nil
}

// check finds attributes that exclude each other.
func (o *BuildOutput) check() error {
	switch o.Type {
	case OutputImage, OutputDocker, OutputOCI, OutputLocal, OutputTar, OutputNothing:
	default:
		return invalid("output type %q is not known: use local, tar, oci, docker, image or registry", o.Type)
	}
	switch {
	case o.Type == OutputLocal && o.Dest == "":
		return invalid("dest is required for local exporter")
	case o.Type == OutputLocal && o.Dest == "-":
		return invalid("dest cannot be stdout for local exporter")
	case o.Folder && (o.Dest == "" || o.Dest == "-"):
		return invalid("dest is required for oci exporter with tar=false")
	case o.Compression == compress.Zstd && o.DockerTypes:
		return invalid(`exporter option "compression=zstd" conflicts with "oci-mediatypes=false"`)
	case o.DockerTypes && len(o.Annotations)+len(o.DescriptorAnnotations) > 0:
		return invalid(`cannot export annotations with "oci-mediatypes=false"`)
	case o.NoStore && !o.Push:
		return invalid("store=false leaves the image nowhere without push=true")
	case o.ByDigest && !o.Push:
		return invalid("push-by-digest needs push=true")
	}
	if o.Level != nil {
		if err := compress.CheckLevel(o.Compression, *o.Level); err != nil {
			return &kindError{ErrInvalid, err}
		}
	}
	if o.Type != OutputLocal && o.Type != OutputImage && o.Type != OutputNothing && o.Dest == "" && o.Type != OutputDocker {
		o.Dest = "-"
	}
	return nil
}

// AddAnnotation takes one --annotation, "[TYPE[,TYPE...]:]KEY=VALUE", into an output of an image.
func (o *BuildOutput) AddAnnotation(s string) error {
	k, v, ok := strings.Cut(s, "=")
	if !ok {
		return invalid("invalid annotation %q, expected key=value", s)
	}
	types, key, ok := strings.Cut(k, ":")
	if !ok {
		return o.annotate("", k, v)
	}
	for _, t := range strings.Split(types, ",") {
		if t == "" {
			return invalid("invalid annotation type %q, expected type and optional platform in square brackets", t)
		}
		if err := o.annotate(t, key, v); err != nil {
			return err
		}
	}
	return o.check()
}

// isImage reports whether the output is an image in some form.
func (o *BuildOutput) isImage() bool { return slices.Contains(imageTypes, o.Type) }

// stored reports whether the output leaves an image in the store.
func (o *BuildOutput) stored() bool {
	return o.Type == OutputImage && !o.NoStore || o.Type == OutputDocker && o.Dest == ""
}

// level is the compression's.
func (o *BuildOutput) level() int {
	if o.Level != nil {
		return *o.Level
	}
	return compress.DefaultLevel(o.Compression)
}

// mediaTypes are what the output's manifest says.
func (o *BuildOutput) mediaTypes() (manifest, config string) {
	if o.DockerTypes {
		return ocispec.MediaTypeDockerManifest, ocispec.MediaTypeDockerConfig
	}
	return ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig
}
