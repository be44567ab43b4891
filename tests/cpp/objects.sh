# objects.sh ISA OBJECT... - whatever these objects define for the linker to share between objects lies in namespace lc::ISA.
# An inline function of any other namespace, compiled here for a newer machine, could be the copy that all of them get.
# Nor may one that depends on an unnamed namespace be shared: each file means its own by it.
set -eu
isa=$1
shift
local=$(nm -C --defined-only "$@" | awk '$2 ~ /^[WVu]$/' | grep -F "(anonymous namespace)" || true)
if [ -n "$local" ]; then
  echo "Shared, but of an unnamed namespace:"
  echo "$local" | cut -d ' ' -f 2- | sort | uniq -c
  exit 1
fi
shared=$(nm -C --defined-only "$@" | awk '$2 ~ /^[WVu]$/' | grep -v -E -e "^[0-9a-f]+ . (guard variable for |typeinfo for |typeinfo name for |vtable for )?([^(]* )?lc::$isa::" -e " DW\.ref\." || true)
[ -z "$shared" ] && exit 0
echo "Weak or unique symbols outside of lc::$isa:"
echo "$shared" | cut -d ' ' -f 2- | sort | uniq -c
exit 1
