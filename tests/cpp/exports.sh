# exports.sh LIBRARY LIST - the library exports the symbols of the list and no others.
set -eu
exported=$(nm -D --defined-only "$1" | awk '$2 != "A" { print $3 }' | LC_ALL=C sort)
[ "$exported" = "$(cat "$2")" ] && exit 0
echo "The exported symbols (+) are not those of $2 (-):"
echo "$exported" | diff -u "$2" - | tail -n +4
exit 1
